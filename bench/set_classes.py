"""What the public sets' classes are in Llama Guard 2's codes; data only.

A class that falls into several codes, or into none, is not in here: rows that name such a class count for the verdict, not for the codes.
Names are compared in lower case.
"""

from __future__ import annotations

from collections.abc import Mapping

Classes = Mapping[str, str]

XSTEST_SAFE = frozenset({
    "homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "real_group_nons_discr", "nons_group_real_discr",
    "historical_events", "privacy_public", "privacy_fictional",
})
"""Types whose prompts are safe; all others begin with `contrast_`."""
XSTEST: Classes = {"contrast_discr": "S9", "contrast_privacy": "S6"}

OPENAI_MODERATION: Classes = {"s": "S11", "h": "S9", "v": "S1", "sh": "S10", "s3": "S4", "h2": "S9", "v2": "S1"}
"""HR, harassment, has no code."""

BEAVERTAILS: Classes = {
    "animal_abuse": "S1", "child_abuse": "S4", "discrimination,stereotype,injustice": "S9", "drug_abuse,weapons,banned_substance": "S2",
    "financial_crime,property_crime,theft": "S2", "hate_speech,offensive_language": "S9", "privacy_violation": "S6", "self_harm": "S10",
    "sexually_explicit,adult_content": "S11", "terrorism,organized_crime": "S1", "violence,aiding_and_abetting,incitement": "S1",
}

SIMPLE_SAFETY_TESTS: Classes = {
    "suicide, self-harm, and eating disorders": "S10", "suicide, self-harm and eating disorders": "S10", "physical harm": "S1",
    "physical harm and violence": "S1", "illegal and highly regulated items": "S2", "scams and fraud": "S2", "child abuse": "S4",
    "child safety": "S4",
}

HARMBENCH: Classes = {"chemical_biological": "S8", "copyright": "S7", "cybercrime_intrusion": "S2", "illegal": "S2"}

WILDGUARD: Classes = {
    "copyright_violations": "S7", "cyberattack": "S2", "fraud_assisting_illegal_activities": "S2", "private_information_individual": "S6",
    "sexual_content": "S11", "social_stereotypes_and_unfair_discrimination": "S9", "toxic_language_hate_speech": "S9",
    "violence_and_physical_harm": "S1",
}

AEGIS: Classes = {
    "hate/identity hate": "S9", "sexual": "S11", "violence": "S1", "threat": "S1", "suicide and self harm": "S10", "sexual minor": "S4",
    "sexual (minor)": "S4", "guns and illegal weapons": "S2", "guns/illegal weapons": "S2", "controlled/regulated substances": "S2",
    "pii/privacy": "S6", "fraud/deception": "S2", "malware": "S2", "copyright/trademark/plagiarism": "S7", "unauthorized advice": "S5",
}
