"""Tests of study.finding_names on the lists of findings that data sets have."""

import pytest

from helpers.study import PATHOLOGIES
from helpers.study.finding_names import _APART, _NAMES, _NOTES, _PARTS, match_findings

# fmt: off
CHEXPERT = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)
VINDR = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung cavity", "Lung cyst", "Lung Opacity", "Mediastinal shift",
    "Nodule/Mass", "Pulmonary fibrosis", "Pneumothorax", "Pleural thickening", "Pleural effusion", "Rib fracture",
    "Other lesion", "Lung tumor", "Pneumonia", "Tuberculosis", "COPD", "Other disease",
)
# fmt: on


def summarize(ours, theirs):
    matches, apart = match_findings(ours, theirs)
    named = [("ours", name) for match in matches for name in match.ours]
    named += [("theirs", name) for match in matches for name in match.theirs]
    assert {*named, *apart} == {*(("ours", n) for n in ours), *(("theirs", n) for n in theirs)}
    assert not {*named} & {*apart} and all(apart.values())
    return {(match.ours, match.theirs): match for match in matches}, apart


def test_nih_and_chexpert():
    matches, apart = summarize(PATHOLOGIES, CHEXPERT)
    assert matches[("Effusion",), ("Pleural Effusion",)].is_same
    assert not matches[("Effusion",), ("Pleural Effusion",)].note
    lesion = matches[("Nodule", "Mass"), ("Lung Lesion",)]
    assert lesion.is_same and "cavities" in lesion.note
    assert not matches[("Pleural_Thickening",), ("Pleural Other",)].note.startswith("pleural other also counts")
    assert "diagnosis" in matches[("Pneumonia",), ("Pneumonia",)].note
    assert (
        "any opacity" in apart["ours", "Infiltration"]
        and "mediastinum" in apart["theirs", "Enlarged Cardiomediastinum"]
    )
    assert apart["theirs", "Support Devices"] == "the other side has no Support Devices"
    assert "pneumonia one of its causes" in apart["theirs", "Lung Opacity"]
    assert {name for who, name in apart if who == "ours"} == {"Infiltration", "Emphysema", "Fibrosis", "Hernia"}


def test_matching_is_symmetric():
    for one, two in ((PATHOLOGIES, CHEXPERT), (PATHOLOGIES, VINDR), (CHEXPERT, VINDR)):
        there, back = match_findings(one, two)[0], match_findings(two, one)[0]
        assert {(m.ours, m.theirs, m.is_same, m.note) for m in there} == {
            (m.theirs, m.ours, m.is_same, m.note) for m in back
        }


def test_parts_of_a_finding_are_told_from_all_of_it():
    (match,), apart = match_findings(PATHOLOGIES, ["Nodule"])
    assert (match.ours, match.theirs, match.is_same) == (("Nodule",), ("Nodule",), True) and "30 mm" in match.note
    assert len(apart) == 13
    (match,), _ = match_findings(["Nodule/Mass"], ["nodule"])
    assert not match.is_same and match.note.startswith("nodule or mass also counts mass")
    (match,), _ = match_findings(CHEXPERT, ["Rib fracture", "Clavicle fracture"])
    assert match.ours == ("Fracture",) and not match.is_same and "vertebral" in match.note
    (match,), _ = match_findings(VINDR, ["Lung Lesion"])
    assert (match.ours, match.is_same) == (("Nodule/Mass",), True)
    assert match_findings(["Mass", "Nodule"], ["Nodule", "Nodule or mass"])[0][0].theirs == ("Nodule or mass",)


def test_names_of_ones_own_match_as_they_are_written():
    matches, apart = match_findings(["Big_heart", "Mass"], ["big heart", "MASS", "rods"])
    assert [(m.ours, m.theirs) for m in matches] == [(("Big_heart",), ("big heart",)), (("Mass",), ("MASS",))]
    assert [*apart] == [("theirs", "rods")]


@pytest.mark.parametrize("names", [(), ("A",)])
def test_nothing_in_common(names):
    matches, apart = match_findings(names, ["B"])
    assert not matches and len(apart) == len(names) + 1


def test_the_table_names_each_finding_once():
    every = [name for here, others in _NAMES.items() for name in (here, *others)]
    assert len(every) == len(set(every)) and every == [name.casefold() for name in every]
    assert {*_PARTS, *_NOTES} <= set(_NAMES) and all(one in _NAMES for one, *_ in _APART)
