"""What a harvested text must be to pass as safe: not hateful, not explicit, no instructions for harm; personal data masked."""

from __future__ import annotations

import re

# whole words; hate and period slurs, explicit sex, sexual violence, and what reads as instructions for harm
_DROP = re.compile(
    r"\b(nigg\w*|negr(o|oes|os|ess|esse|a|as)|nègres?|negresses?|neger\w*|niggers?|darki(e|es)|darky|coons?|kikes?|spics?|chinks?|gooks?|chinam[ae]n|japs?|"
    r"dagos?|wogs?|wops?|fag(got)?s?|tranny|trannies|dykes?|jewess\w*|jewboy|yids?|half-?breeds?|mulatto\w*|quadroon|squaws?|savages?|"
    r"injuns?|redskins?|gyps(y|ies)|zigeuner\w*|coolies?|heathens?|kaffirs?|hottentots?|retard(s|ed)?|cripples?|papists?|"
    r"jud(en|ío|íos|eu|eus)|juifs?|ebre[io]|moros?|zingar[io]|inferior races?|"
    r"fuck\w*|cunts?|cocks?|pussy|blow ?jobs?|dildos?|porn\w*|orgasms?|masturbat\w*|erections?|penetrat\w+ her|whores?|sluts?|bitch\w*|"
    r"hure\w*|putain\w*|putas?|puttan\w*|nackt\w*|nudes?|rap(e|ed|es|ist|ists|ing)|incest\w*|molest\w*|pedophil\w*|paedophil\w*|"
    r"child (pornograph|sexual|abuse)\w*|"
    r"sexcopter\w*|viler passions|(make|build|making|building) (a |an )?(pipe )?(bomb|explosive)s?|suicide methods?|lethal dose)\b",
    re.IGNORECASE)

SCARY = re.compile(
    r"\b(kill\w*|attack\w*|bomb\w*|weapons?|guns?|pistols?|rifles?|swords?|murder\w*|suicid\w*|drugs?|doses?|dosage|overdose\w*|exploit\w*|"
    r"poison\w*|dea(d|th|ths|dly)|die[ds]?|dying|blood\w*|wars?|battle\w*|kni(fe|ves)|daggers?|shoot\w*|shot|terror\w*|abus\w+|steal\w*|stole\w*|"
    r"thie(f|ves)|robb\w+|hack\w*|inject\w*|abort\w*|fights?|fought|assault\w*|hat(e|ed|red)|enslave\w*|slave\w*|virus\w*|malware|malicious\w*|"
    r"crim(e|es|inal|inals)|victim\w*|executioners?|hanged|strangl\w*|corpses?|wound\w*|soldiers?|arm(y|ies)|enem(y|ies)|"
    r"violen\w+|sex\w*|pregnan\w*|cancers?|zombies?|orphan\w*|vulnerab\w+|fraud\w*|punish\w*|prison\w*|police|illegal\w*|"
    r"threat\w*|danger\w*|explo(de|ded|sion|sions|sive|sives)|massacre\w*|conspir\w+|invad\w+|invasion|revolver|cannon\w*|gallows|"
    r"tot|töte\w*|tod(es)?|mord\w*|krieg\w*|blut\w*|waffe\w*|straf\w*|gewalt\w*|mort(e|s|es)?|tu(é|er|ée|és)|guerr[ae]s?|sang(ue|re)?|armes?|"
    r"armas?|muert[eo]s?|matar\w*|mat(ó|aron)|asesin\w*|assassin\w*|delitto|delitos?|uccid\w*|uccis[oaie]|coltello|crimes?|peligro\w*|"
    r"tuer|tueur|verletz\w*|angriff\w*|mata)\b",
    re.IGNORECASE)

_MASKS = (
    (re.compile(r"[\w.+-]+(@|\s?\[at\]\s?)[\w-]+(\.[\w-]+)+"), "[EMAIL]"),
    (re.compile(r"(?<![\w.:/-])(\+?\d{1,3}[ .-]?)?(\(\d{2,4}\)|\d{3})[ .-]\d{3,4}[ .-]\d{3,4}(?![\w/-]|[.:]\d)"), "[PHONE]"),
    (re.compile(r"(?<![\w.])\+\d{1,3}[ -]\d{2,4}[ -]\d{3,}([ -]\d{2,})*"), "[PHONE]"),
    (re.compile(r"(1-)?8(00|55|66|77|88)-[\d-]*\d{4}"), "[PHONE]"),
)


_COMMON = {language: set(words.split()) for language, words in {
    "en": "the of and to in is that for you with this are it on be as not or from by your",
    "de": "der die das und ein eine ist zu den mit von nicht sich auf für im des dem es ich er sie wird sind auch oder wie",
    "fr": "le la les de des du et un une est en pour que qui dans ne pas sur vous par au avec il elle ce se plus son",
    "es": "el la los las de del y en un una que es por con para se no su al lo como más o está le ha",
    "it": "il lo la i gli le di del della e un una che è per con non si da in al dei nel come più sono ha ed",
    "pt": "o a os as de do da e em um uma que é por com para se não no na ao dos das como mais ou seu sua foi",
}.items()}


def in_language(text: str, language: str) -> bool:
    """More common words of the language than English ones, and at least three."""
    words = re.findall(r"\w+", text.lower())
    own, english = (sum(word in _COMMON[name] for word in words) for name in (language, "en"))
    return own >= 3 and (own > english or language == "en")


def masked(text: str) -> str:
    for pattern, mask in _MASKS:
        text = pattern.sub(mask, text)
    return text


def passes(text: str, kind: str) -> bool:
    """Enough words, printable, and none of the words that make its label doubtful."""
    letters = sum(character.isalpha() for character in text)
    enough = letters >= (0.3 if kind in {"lines", "code"} else 0.6) * len(text)
    return enough and "\ufffd" not in text and len(text.split()) >= 6 and not _DROP.search(text)
