"""Makes study/readers/openi_views.json: which image of each study of the Indiana collection (Open-i) is frontal.

Usage: python scripts/derive_openi_views.py NLMCXR_reports.tgz torchxrayvision-1.5.7-py3-none-any.whl
The wheel comes with `pip download --no-deps torchxrayvision==1.5.7`; two of its tables are read, no code of it is run.
Prints how far the two tables agree.
"""

import json
import sys
import textwrap
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import pandas as pd

from helpers.runtime import write_text
from helpers.study import read_openi_reports

ABOUT = (
    "For each study of the Indiana collection (Open-i), which of its images in the order of its report is frontal: the "
    "first, but for those listed here. Derived by scripts/derive_openi_views.py from nlmcxr_tsne_pa.csv.gz and "
    "nlmcxr_dicom_metadata.csv.gz of TorchXRayVision 1.5.7 (Joseph Paul Cohen and others, Apache-2.0), which sort the "
    "first image of each study by its pixels and list the headers of the DICOM files. See docs/openi.md."
)
LATERAL_POSITIONS = ("LL", "RL", "LATERAL", "LARGE LATERAL")
LATERAL_ORIENTATIONS = ("['A', 'F']", "['P', 'F']")  # rows run from front to back or back to front


def read_member(wheel, name):
    """Reads a table of the wheel, indexed by image as the reports name it."""
    with zipfile.ZipFile(wheel) as archive, archive.open(f"torchxrayvision/data/{name}") as file:
        table = pd.read_csv(file, compression="gzip", low_memory=False)
    return table.set_index("imageid").rename(index=lambda image: f"{image}.png")


def derive(reports, wheel):
    """Returns the reports' frame with `first_is` ("PA" or "L", by study) and `header_lateral` (bool, by image)."""
    headers = read_member(wheel, "nlmcxr_dicom_metadata.csv.gz")
    lateral = headers["View Position"].isin(LATERAL_POSITIONS)
    lateral |= headers["Patient Orientation"].isin(LATERAL_ORIENTATIONS)
    images = reports.assign(header_lateral=reports["image"].isin(headers.index[lateral]))
    sorted_by_pixels = images["image"].map(read_member(wheel, "nlmcxr_tsne_pa.csv.gz")["tsne-view"])
    first = sorted_by_pixels[images["position"] == 1].set_axis(images["study"][images["position"] == 1])
    return images.assign(
        first_is=images["study"].map(first), n_images=images.groupby("study")["image"].transform("size")
    )


def main(archive, wheel):
    """Writes the list and prints the agreement."""
    images = derive(read_openi_reports(archive), wheel)
    first, second = images[images["position"] == 1], images[images["position"] == 2].set_index("study")
    turned = first[first["first_is"] == "L"]
    pairs = turned[turned["n_images"] == 2]["study"]
    taken = pairs[~second.loc[pairs, "header_lateral"].to_numpy()]
    numbers = {"second": taken, "none": turned["study"][~turned["study"].isin(taken)]}
    lists = {key: sorted(int(study.removeprefix("CXR")) for study in studies) for key, studies in numbers.items()}
    lines = {key: textwrap.fill(", ".join(map(str, value)), 114) for key, value in lists.items()}
    body = ",\n".join(f'  "{key}": [\n{textwrap.indent(text, "    ")}\n  ]' for key, text in lines.items())
    path = ROOT / "notebooks/helpers/study/readers/openi_views.json"
    write_text(path, f'{{\n  "about": {json.dumps(ABOUT)},\n{body}\n}}\n')

    print({key: len(value) for key, value in lists.items()})
    print("first images by pixels and header:")
    print(pd.crosstab(first["first_is"], first["header_lateral"]).to_string())
    print("second images of two, where the first is:")
    two = second[second["n_images"] == 2]
    print(pd.crosstab(two["first_is"], two["header_lateral"]).to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
