"""The tables of docs/reference_evaluation, drawn from its files as Markdown, and that of the README."""

from page_tables import format_auc, format_lead, write_table

LEAD = ("difference", "difference_low", "difference_high")
PARTS = {"all": "all images", "official": "official list"}  # folders of docs/reference_evaluation


def draw_real_labels(reference):
    """Returns the table of what has been measured on real labels. `reference` is that of `read_reference`."""
    rows, sets = [], {"all": "all", "official": "in the list"}
    drop = reference["drop"].set_index("images")
    rows.append(["a retrained CheXNet", *(format_auc(drop.loc[name]) for name in sets.values())])
    floors = [reference[part, "floors"].query("pathology == 'mean'").set_index("floor") for part in sets]
    names = {"metadata only": "age, sex, view and follow-up number, no image", "view only": "the view alone, no image"}
    rows += [[text, *(format_auc(means.loc[name]) for means in floors)] for name, text in names.items()]
    heads = [f"{drop.n['all']:,} test images", f"the {drop.n['in the list']:,} of them in NIH's official test list"]
    return write_table(["predicted by", *(f"mean AUC, {head}" for head in heads)], rows)


def draw_reference_findings(reference, published):
    """Returns the table of the AUC of each finding on both sets of images, beside the one published for the larger."""
    theirs = published[published["study"].str.contains("reproduce-chexnet")].set_index("pathology")["auc"]
    tables = [reference[part, "aucs"].set_index("pathology") for part in PARTS]
    beside = [reference[part, "beside"].set_index("pathology") for part in PARTS]
    rows = []
    for name in [*theirs.index, "mean"]:
        said = theirs.get(name, theirs.mean())
        cells = [
            f"{said:.4f}",
            f"{tables[0].auc[name]:.4f} ({tables[0].auc_low[name]:.3f} to {tables[0].auc_high[name]:.3f})",
        ]
        cells += [format_auc(tables[1].loc[name]), *(f"{t.n_pos[name]:,}" if name != "mean" else "" for t in tables)]
        for table in beside:
            values = table.loc[name] if name != "mean" else table.mean(numeric_only=True)
            cells.append(f"{values['AUC in AP']:.3f}, {values['AUC in PA']:.3f}".replace("nan", "–"))
        rows.append([name.replace("_", " "), *cells])
    largest = (tables[0].auc[theirs.index] - theirs).abs().max()
    heads = [
        "finding",
        "published",
        "all images",
        "official list",
        "positives, all",
        "official",
        "in AP, in PA: all",
        "official",
    ]
    return f"The largest difference from a published value is {largest:.0e}, their rounding.\n\n" + write_table(
        heads, rows
    )


def draw_reference_floors(reference):
    """Returns the table of mean floors and of the lead over them."""
    rows = []
    for part, text in PARTS.items():
        means = reference[part, "floors"].query("pathology == 'mean'")
        for _, row in means.iterrows():
            of_floor = reference[part, "floors"].query("pathology != 'mean' and floor == @row['floor']")
            least = of_floor.sort_values("difference").iloc[0]
            smallest = f"{least['pathology'].replace('_', ' ')}, {format_lead(least, LEAD)}"
            rows.append([text, row["floor"], format_auc(row), format_lead(row, LEAD), smallest])
    return write_table(
        ["images", "floor", "mean AUC of the floor", "CheXNet's lead", "smallest lead of a finding"], rows
    )


def draw_subgroups(reference):
    """Returns the table of the mean AUC in subgroups, over the findings that no group of the attribute has few of."""
    rows = {}
    for part in PARTS:
        for attribute, table in reference[part, "subgroups"].groupby("attribute", sort=False):
            few = set(table.loc[table["small"] | table["auc"].isna(), "pathology"])
            kept = table[~table["pathology"].isin(few)]
            for group, mean in kept.groupby("group", sort=False)["auc"].mean().items():
                rows.setdefault((attribute, group), []).append(f"{mean:.3f} of {kept['pathology'].nunique()}")
    rows = [[*key, *cells] for key, cells in rows.items() if len(cells) == len(PARTS)]
    return write_table(["attribute", "group", *PARTS.values()], rows)


def draw_radiologists(reference):
    """Returns the table of the AUC with radiologists' labels beside that with the mined ones, on the same images."""
    rows = []
    for part, text in PARTS.items():
        for row in reference[part, "radiologists"].to_dict("records"):
            mined = (
                f"{row['AUC, mined labels']:.3f}",
                f"{row['mined labels: sensitivity']:.0%}, {row['specificity']:.0%}",
            )
            rows.append([text, row["finding"], row["n_pos"], row["n_neg"], format_auc(row), *mined])
    heads = [
        "images",
        "finding",
        "with it",
        "without",
        "AUC, radiologists' labels",
        "AUC, mined labels",
        "mined labels: sensitivity, specificity",
    ]
    return write_table(heads, rows)


def draw_top(reference):
    """Returns the table of the share of labels among the top k, beside a constant list."""
    rows = []
    for part, text in PARTS.items():
        for row in reference[part, "top"].itertuples():
            rows.append(
                [text, row.ranking, row.k, f"{row.labels:.1%} ({row.low:.1%} to {row.high:.1%})", f"{row.findings:.1%}"]
            )
    return write_table(["images", "list", "k", "share of all labels", "mean share of a finding's labels"], rows)


def draw_drop(drop):
    """Returns the tables that compare the images in NIH's list with the others."""
    described, weighted = drop[drop["ap"].notna()], drop[drop["ap"].isna()]
    heads = ["images", "number", "AP", "no finding", "findings an image", "images a patient"]
    cells = [
        [
            row.images,
            f"{row.n:,}",
            f"{row.ap:.0%}",
            f"{row.no_finding:.0%}",
            f"{row.findings:.2f}",
            f"{row.images_a_patient:.1f}",
        ]
        for row in described.itertuples()
    ]
    text = write_table(heads, cells)
    heads = [
        "images",
        "mean AUC",
        "without Hernia",
        "without Hernia in AP; in PA",
        "with Hernia: against images with no finding; with others",
    ]
    cells = [
        [row["images"], format_auc(row), f"{row['auc_without_hernia']:.3f}",
         f"{row['AP_auc_without_hernia']:.3f}; {row['PA_auc_without_hernia']:.3f}",
         f"{row['auc_against_no_finding']:.3f}; {row['auc_against_other_findings']:.3f}"]
        for _, row in described.iterrows()
    ]  # fmt: skip
    cells += [
        [row["images"], format_auc(row), f"{row['auc_without_hernia']:.3f}", "", ""] for _, row in weighted.iterrows()
    ]
    return f"{text}\n\n{write_table(heads, cells)}"
