"""What findings are called in several data sets, which of them mean the same, and which do not.

Names are those of NIH ChestX-ray14 (Wang et al., CVPR 2017), CheXpert (Irvin et al., AAAI 2019) and MIMIC-CXR-JPG
(Johnson et al., 2019), which share a labeler, VinDr-CXR (Nguyen et al., Scientific Data 2022), PadChest (Bustos et al.,
Medical Image Analysis 2020), the RSNA pneumonia challenge (Shih et al., Radiology: AI 2019), JSRT (Shiraishi et al.,
AJR 2000) and Open-i's indexing (Demner-Fushman et al., JAMIA 2016). What CheXpert's names count is read off its
labeler's phrases (github.com/stanfordmlgroup/chexpert-labeler, phrases/mention). Which are compared is this
repository's choice.
"""

import re
from dataclasses import dataclass
from types import MappingProxyType

# A finding, by its name here, and what others call it; case, "_" and signs do not matter.
_NAMES = MappingProxyType(
    {
        "atelectasis": ("pulmonary atelectasis",),
        "cardiomegaly": (),
        "consolidation": ("pulmonary consolidation",),
        "edema": ("pulmonary edema",),
        "effusion": ("pleural effusion",),
        "emphysema": ("pulmonary emphysema",),
        "fibrosis": ("pulmonary fibrosis",),
        "fracture": ("fractures bone",),
        "hernia": ("hiatal hernia", "hernia hiatal"),
        "infiltration": ("infiltrate", "infiltrates"),
        "lung opacity": ("opacity",),
        "mass": ("pulmonary mass",),
        "nodule": ("pulmonary nodule", "lung nodule"),
        "nodule or mass": ("nodule mass", "lung lesion"),
        "pleural other": (),
        "pleural thickening": (),
        "pneumonia": (),
        "pneumothorax": (),
    }
)

# A finding that counts others, where the other side has these alone.
_PARTS = MappingProxyType(
    {
        "nodule or mass": ("nodule", "mass"),
        "fracture": ("rib fracture", "clavicle fracture", "vertebral fracture"),
        "pleural other": ("pleural thickening",),
    }
)

# What to keep in mind where a finding is compared, also under the same name.
_NOTES = MappingProxyType(
    {
        "edema": "CheXpert counts heart failure and vascular congestion as Edema",
        "hernia": "NIH's Hernia is any hernia in a report, others' hiatal ones",
        "infiltration": "readers do not agree what it means; the Fleischner glossary (2008) advises against the word",
        "lung opacity": "CheXpert counts any opacity, RSNA those that suggest pneumonia",
        "nodule": "by size a nodule is up to 30 mm, but 4 of JSRT's 154 are larger",
        "nodule or mass": "CheXpert's Lung Lesion also counts cavities and tumors",
        "pleural other": "CheXpert's Pleural Other also counts pleural scars and fibrosis",
        "pneumonia": "a diagnosis, which the image alone does not settle; reports name it as clinicians expect it",
    }
)

# Names that look comparable and are not.
_APART = (
    ("infiltration", "lung opacity", "Lung Opacity counts any opacity, nodules and collapse too"),
    ("pneumonia", "lung opacity", "an opacity is what the image shows, pneumonia one of its causes"),
    ("consolidation", "lung opacity", "consolidation is one of several opacities"),
    ("cardiomegaly", "enlarged cardiomediastinum", "the wide mediastinum is not the heart alone"),
    ("fibrosis", "ild", "interstitial lung disease is fibrosis among others"),
    ("fibrosis", "pleural other", "CheXpert counts fibrosis as Pleural Other, with what is of the pleura"),
    ("emphysema", "copd", "COPD is diagnosed by spirometry, and many who have it show no emphysema"),
    ("mass", "lung tumor", "a tumor is diagnosed by more than the image"),
    ("infiltration", "ild", "interstitial disease is one meaning of infiltration among others"),
)


@dataclass(frozen=True)
class Match:
    """Findings of two lists that can be compared: a score is the highest of `ours`, a label whether any of `theirs`.

    Attributes:
        ours: names in the first list.
        theirs: names in the second list.
        is_same: whether both mean the same; otherwise one side counts more than the other.
        note: what to keep in mind; may be empty.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    is_same: bool
    note: str


def match_findings(ours, theirs):
    """Matches the findings of two data sets by their names.

    Args:
        ours: names of findings of the one, such as a model's.
        theirs: names of findings of the other, such as those of another hospital's labels.

    Returns:
        Tuple of a list of `Match`, in the order of `ours`, and a dict from (`"ours"` or `"theirs"`, name) of every
        finding that is in none of them to the reason.
    """
    sides = [_group(names) for names in (ours, theirs)]
    matches = []
    for name, called in sides[0].items():
        if name in sides[1]:
            matches.append(Match(called, sides[1][name], True, _NOTES.get(name, "")))
            continue
        parts = [part for part in _PARTS.get(name, ()) if part in sides[1]]
        wholes = [whole for whole, of in _PARTS.items() if name in of and whole in sides[1] and whole not in sides[0]]
        if parts:
            matches.append(Match(called, _join(sides[1], parts), *_compare(name, parts)))
        elif wholes:
            parts = [part for part in _PARTS[wholes[0]] if part in sides[0] and part not in sides[1]]
            matches.append(Match(_join(sides[0], parts), sides[1][wholes[0]], *_compare(wholes[0], parts)))
    matches = list(dict.fromkeys(matches))  # each part of a whole finds the same match
    matched = {("ours", name) for match in matches for name in match.ours}
    matched |= {("theirs", name) for match in matches for name in match.theirs}
    apart = {}
    for who, side, other in (("ours", *sides), ("theirs", *sides[::-1])):
        for name, called in side.items():
            reasons = [why for one, two, why in _APART if {one, two} & {name} and {one, two} - {name} <= other.keys()]
            missing = f"the other side has no {called[0]}"
            apart |= {(who, c): "; ".join(reasons) or missing for c in called if (who, c) not in matched}
    return matches, apart


def _group(names):
    """Returns a dict from each finding's name here to its names in a list, in their order."""
    known = {name: here for here, others in _NAMES.items() for name in (here, *others)}
    groups = {}
    for name in names:
        spelled = " ".join(re.findall(r"[^\W_]+", name.casefold()))
        groups.setdefault(known.get(spelled, spelled), []).append(name)
    return {here: tuple(called) for here, called in groups.items()}


def _join(side, parts):
    return tuple(name for part in parts for name in side[part])


def _compare(whole, parts):
    """Returns whether some parts are all of a whole, and the note."""
    lacking = [part for part in _PARTS[whole] if part not in parts]
    notes = [f"{whole} also counts {', '.join(lacking)}"] if lacking else []
    return not lacking, "; ".join([*notes, *filter(None, [_NOTES.get(whole)])])
