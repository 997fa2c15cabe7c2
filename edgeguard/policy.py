"""Policies: the list of categories that is put to a guard model; no template, no tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeguard import strict_json
from edgeguard.errors import PolicyError

if TYPE_CHECKING:
    from edgeguard.profiles import Profile

MAX_CATEGORIES = 50
MAX_BYTES = 1 << 20
"""Largest policy file."""

_CODE = re.compile(r"[A-Z][1-9][0-9]?")
_CATEGORY_KEYS = {"name", "description", "code", "slug"}
_FILE_KEYS = {"name", "categories", "include", "described"}


@dataclass(frozen=True)
class PolicyCategory:
    """One category of a policy."""

    code: str
    """As the model answers it, `S9`."""
    name: str
    """For people, one line without a full stop: `Suicide & Self-Harm`."""
    description: str | None
    """Further lines of the prompt, or None for the name alone."""
    slug: str
    """For programs, `self-harm`."""
    prompt_name: str = ""
    """Wording in the prompt where it is not the name."""

    def __post_init__(self) -> None:
        if not _CODE.fullmatch(self.code):
            raise PolicyError(f"{self.code!r} is not a category code; write a capital letter and a number, as S1 or S12.")

    @property
    def wording(self) -> str:
        """The name as the prompt has it."""
        return self.prompt_name or self.name


@dataclass(frozen=True)
class Policy:
    """Categories in the order of the prompt; at least one, at most 50, none of them twice."""

    categories: tuple[PolicyCategory, ...]
    name: str = "custom"

    def __post_init__(self) -> None:
        count = len(self.categories)
        if not 1 <= count <= MAX_CATEGORIES:
            raise PolicyError(f"Policy {self.name!r} has {count} categories; 1 to {MAX_CATEGORIES} are possible.")
        _no_duplicates("code", [category.code for category in self.categories])
        _no_duplicates("name", [category.name.casefold() for category in self.categories])
        _no_duplicates("slug", [category.slug for category in self.categories])

    @classmethod
    def of(cls, given: Sequence[str | Mapping[str, Any]], prefix: str = "S", *, name: str = "custom") -> Policy:
        """From names, or mappings with `name` and optional `description`, `code`, `slug`; codes are numbered from `prefix`.

        A full stop after a name is dropped: the template has one. Raises `PolicyError`.
        """
        return cls(_categories(given, prefix, 1), name)

    @classmethod
    def select(cls, profile: Profile, codes: Iterable[str], *, described: bool = False) -> Policy:
        """A profile's own categories by code, in the profile's order, with their descriptions if `described`.

        Raises `PolicyError` for a code that the profile does not have or that is given twice.
        """
        return cls(_select(profile, codes, described), f"{profile.name}-selection")

    @classmethod
    def load(cls, path: str | Path, prefix: str | None = None, *, profile: Profile | None = None) -> Policy:
        """From a local YAML or JSON file: a list as for `Policy.of`, or a mapping with it under `categories`.

        The mapping may have a `name`, and `include`: codes of categories of `profile` that come first (`described: true`
        with their descriptions); own categories are then numbered after the last one of the profile. The prefix of
        codes is the profile's, or S. Raises `PolicyError`.
        """
        path = Path(path)
        document = _read(path)
        if isinstance(document, list):
            document = {"categories": document}
        if not isinstance(document, dict):
            raise PolicyError(f"{path.name} holds no policy: a list of categories is needed, or a mapping with `categories`.")
        _only(document, _FILE_KEYS, path.name)
        name = _text(document.get("name", path.stem), f"{path.name}: name")
        prefix = prefix or (profile.code_prefix if profile else "S")
        included: tuple[PolicyCategory, ...] = ()
        first = 1
        if "include" in document:
            if profile is None:
                raise PolicyError(f"{path.name} includes categories of a model; give the profile to take them from.")
            included = _select(profile, document["include"], document.get("described", False))
            first = len(profile.taxonomy) + 1
        elif "described" in document:
            raise PolicyError(f"{path.name}: described goes with include only.")
        own = _categories(document["categories"], prefix, first) if "categories" in document else ()
        return cls(included + own, name)


def _categories(given: object, prefix: str, first: int) -> tuple[PolicyCategory, ...]:
    if not isinstance(given, (list, tuple)):
        raise PolicyError(f"A list of categories is needed, not {type(given).__name__}.")
    # before any work is done on a list of any length
    if len(given) > MAX_CATEGORIES:
        raise PolicyError(f"{len(given)} categories are given; {MAX_CATEGORIES} are possible.")
    return tuple(_category(item, prefix, first + index, f"Category {index + 1}") for index, item in enumerate(given))


def _category(item: object, prefix: str, number: int, where: str) -> PolicyCategory:
    fields: Mapping[Any, Any] = {"name": item} if isinstance(item, str) else item if isinstance(item, Mapping) else {}
    if not fields:
        raise PolicyError(f"{where} is {type(item).__name__}; a name or a mapping with a name is needed.")
    _only(fields, _CATEGORY_KEYS, where)
    if "name" not in fields:
        raise PolicyError(f"{where} lacks a name.")
    name = _text(_text(fields["name"], f"{where}: name").removesuffix("."), f"{where}: name")
    if len(name.splitlines()) != 1:
        raise PolicyError(f"{where}: the name must be one line; further lines go into the description.")
    code = _text(fields.get("code", f"{prefix}{number}"), f"{where}: code")
    if not code.startswith(prefix):
        raise PolicyError(f"{where}: the code {code} does not begin with {prefix}, the letter of this model's codes.")
    description = fields.get("description")
    return PolicyCategory(
        code=code,
        name=name,
        description=None if description is None else _text(description, f"{where}: description"),
        slug=_text(fields.get("slug", _slug(name) or code.lower()), f"{where}: slug"),
    )


def _select(profile: Profile, codes: object, described: object) -> tuple[PolicyCategory, ...]:
    known = {category.code: category for category in profile.taxonomy}
    if isinstance(codes, (str, Mapping)) or not isinstance(codes, Iterable):
        raise PolicyError(f"A list of category codes is needed, not {type(codes).__name__}.")
    if not isinstance(described, bool):
        raise PolicyError("described must be true or false.")
    wanted = list(codes)
    if unknown := [code for code in wanted if not isinstance(code, str) or code not in known]:
        raise PolicyError(f"{profile.title} has no category {unknown[0]!r}; it has {', '.join(known)}.")
    _no_duplicates("code", wanted)
    return tuple(
        PolicyCategory(own.code, own.name, own.description if described else None, own.slug, own.prompt_name)
        for own in profile.taxonomy
        if own.code in wanted
    )


def _read(path: Path) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PolicyError(f"The policy file {path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise PolicyError(f"The policy file {path} is larger than {MAX_BYTES} bytes.")
    import yaml

    try:
        text = data.decode("utf-8-sig")
        return strict_json.loads(text) if path.suffix.lower() == ".json" else _yaml(text)
    except strict_json.DuplicateKeyError as error:
        raise PolicyError(f"The policy file {path}: {error}, so it is not clear which one is meant.") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML lets several of these through for a wrong explicit tag
        raise PolicyError(f"The policy file {path} is not valid UTF-8 YAML or JSON: {error}") from error


def _yaml(text: str) -> object:
    """PyYAML's plain values, with each key of a mapping once; PyYAML itself would take the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401, PyYAML's own types
            node = super().compose_mapping_node(anchor)
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                raise strict_json.DuplicateKeyError(next(key for key in keys if keys.count(key) > 1)[1])
            return node

    return yaml.load(text, Loader)  # noqa: S506, a SafeLoader


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise PolicyError(f"{where} must be a text that is not blank.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise PolicyError(f"{where} holds a lone surrogate; it is not valid text.") from None
    return value.strip()


def _only(fields: Mapping[Any, Any], known: set[str], where: str) -> None:
    if unknown := [key for key in fields if key not in known]:
        raise PolicyError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}.")


def _no_duplicates(what: str, values: Sequence[str]) -> None:
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise PolicyError(f"The {what} {twice!r} is given twice; each category needs its own.")


def _slug(name: str) -> str:
    return re.sub(r"[\W_]+", "-", name.casefold()).strip("-")
