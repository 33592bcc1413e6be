"""The contents of the page of `make demo`, as HTML and pictures; without Gradio and without a model."""

import base64
import html
import io

import numpy as np
from PIL import Image

from helpers.evaluation import FEW_POSITIVES, resize_maps
from helpers.export import name_few_positives

AGAINST, FOR = (37, 99, 235), (220, 38, 38)  # blue, red: the ends of the colors of a heatmap
_LEAST_SCALE = 1.0  # logit; so that weak evidence looks weak
_NOTICE = "For research and teaching only, not for clinical use."
_SYNTHETIC = "The model was trained on synthetic images: these numbers mean nothing for a real radiograph."

CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important; --cxr-soft: #526077}
.dark .gradio-container, .gradio-container.dark {--cxr-soft: #a3b1c6}
.gradio-container .app {padding-inline: clamp(14px, 3.6vw, 32px) !important}
.gradio-container .html-container {padding: 0 !important}
#image {border: 1.5px dashed #94a3b8; border-radius: 10px}
#image label {box-shadow: none; border: 0}
#image td.download {display: none}
#draw {border: 1px solid #0f766e; color: #0f766e; background: none; box-shadow: none; font-weight: 600}
.dark #draw {color: #5eead4; border-color: #5eead4}
.cxr-top {display: flex; flex-wrap: wrap; align-items: center; gap: 10px 20px; padding-bottom: 6px}
.cxr-top h1 {font-size: 25px; font-weight: 650; letter-spacing: -.01em; margin: 0; flex: 1 1 auto}
.cxr-use {background: #b45309; color: #fff; font-weight: 650; padding: 8px 16px; border-radius: 8px; font-size: 15px}
.cxr-facts {color: var(--cxr-soft); font-size: 13.5px; line-height: 1.6; margin-bottom: 6px}
.cxr-facts b {color: var(--body-text-color); font-weight: 600}
.cxr-stage {position: relative; width: 100%; aspect-ratio: 1; background: #0b0f14; border-radius: 10px;
    overflow: hidden}
.cxr-stage img {position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; border-radius: 0}
.cxr-heat {opacity: var(--cxr-heat, .6)}
.cxr-empty {position: absolute; inset: 0; display: grid; place-items: center; text-align: center; padding: 30px}
.cxr-empty span {color: #a3b1c6 !important; font-size: 15px; line-height: 1.8}
.cxr-caption {display: flex; justify-content: space-between; gap: 12px; font-size: 13px; padding-top: 8px}
:is(.cxr-caption, .cxr-hint) span {color: var(--cxr-soft)}
.cxr-legend {display: grid; grid-template-columns: auto 1fr auto; gap: 8px 10px; align-items: center; font-size: 13px;
    color: var(--body-text-color)}
.cxr-legend i {height: 12px; border-radius: 6px; display: block;
    background: linear-gradient(90deg, rgb(37,99,235), #fff0 50%, rgb(220,38,38)), #7b8798}
.cxr-legend small {grid-column: 1 / 4; color: var(--cxr-soft); font-size: 12.5px; line-height: 1.5}
.cxr-wide {overflow-x: auto; contain: inline-size}
.cxr-table {width: 100%; border-collapse: collapse; border: 0 !important; font-size: 14.5px; margin: 0 !important;
    font-variant-numeric: tabular-nums}
.cxr-table :is(th, td, tr) {border: 0 !important; background: none !important; text-align: right !important}
.cxr-table th {font-weight: 500; font-size: 12.5px; color: var(--cxr-soft) !important; padding: 2px 6px 8px}
.cxr-table td {padding: 9px 6px; border-top: 1px solid var(--border-color-primary) !important; white-space: nowrap}
.cxr-table :is(th, td):first-child {text-align: left !important; padding-left: 0; font-weight: 600;
    white-space: normal}
.cxr-table :is(th, td):last-child {padding-right: 0}
.cxr-table td:nth-child(2) {width: 20%}
.cxr-bar {position: relative; display: block; height: 10px; min-width: 48px; border-radius: 5px;
    background: var(--border-color-primary)}
.cxr-bar b {position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: #94a3b8}
.cxr-above .cxr-bar b {background: #0f766e}
.cxr-bar i {position: absolute; top: -4px; bottom: -4px; width: 2px; background: var(--body-text-color)}
.cxr-tag {display: inline-block; border-radius: 999px; padding: 1px 10px; font-size: 12.5px; font-weight: 600;
    color: var(--cxr-soft)}
.cxr-above .cxr-tag {background: #0f766e; color: #fff}
.cxr-note {border-left: 4px solid; border-radius: 6px; padding: 10px 14px; font-size: 14px; line-height: 1.55}
.cxr-note p {margin: 0; color: var(--body-text-color)}
.cxr-note p + p {margin-top: 6px}
.cxr-note.warn {border-color: #d97706; background: #f59e0b1f}
.cxr-note.error {border-color: #dc2626; background: #ef44441c}
.cxr-note.fine {border-color: #0f766e; background: #0d948814}
.cxr-note + .cxr-wide {margin-top: 12px}
.cxr-hint {font-size: 12.5px; line-height: 1.5; color: var(--cxr-soft); padding-top: 8px}
@media (max-width: 600px) {
    .cxr-table {font-size: 13px}
    .cxr-table th {font-size: 11px; padding: 2px 3px 8px}
    .cxr-table td {padding: 9px 3px}
    .cxr-table :is(th, td):nth-child(2), .cxr-bars {display: none}
    .cxr-tag {padding: 1px 5px; font-size: 11.5px}
}
@media (max-width: 374px) {
    .cxr-table {font-size: 12.5px}
    .cxr-table :is(th, td):nth-child(4), .cxr-lift {display: none}
}
"""


def pretty(name):
    """Returns a finding's name with spaces."""
    return name.replace("_", " ")


def show_header(facts):
    """Returns the head of the page: title, notice, and facts about the model."""
    study = "synthetic images" if facts["synthetic"] else "real radiographs"
    values = {
        "Study": f"{facts['study']} ({study})",
        "Split": facts["split"],
        "Image": f"{facts['side']} x {facts['side']} pixels",
        "Weights": facts["weights_sha256"][:12],
        "Trained with": facts["versions"],
    }
    listed = " &nbsp;·&nbsp; ".join(f"{name} <b>{html.escape(str(value))}</b>" for name, value in values.items())
    return (
        f'<div class="cxr-top"><h1>Findings on a chest radiograph</h1><div class="cxr-use">{_NOTICE}</div></div>'
        f'<div class="cxr-facts">{listed}</div>'
    )


def show_notes(notes, kind):
    """Returns a box of sentences; `kind` is "warn", "error" or "fine"."""
    role = ' role="alert"' if kind == "error" else ""
    return f'<div class="cxr-note {kind}"{role}>' + "".join(f"<p>{html.escape(note)}</p>" for note in notes) + "</div>"


def show_empty():
    """Returns the frame of the image, without an image."""
    hint = "No image yet.<br>Upload a frontal chest radiograph, or use a synthetic one."
    return f'<div class="cxr-stage"><div class="cxr-empty"><span>{hint}</span></div></div>'


def show_image(image, heatmap, side, finding, caption):
    """Returns the image under a heatmap, whose opacity is the CSS variable `--cxr-heat`.

    Args:
        image: text, the image as a data URL, see `encode_picture`.
        heatmap: float array (h, w).
        side: int, pixels of the image that the heatmap was computed on.
        finding: text, the finding of the heatmap.
        caption: text below the image.
    """
    picture, scale = color_map(heatmap, side)
    overlay = encode_picture(picture, "PNG")
    label = html.escape(pretty(finding), quote=True)
    return (
        f'<div class="cxr-stage"><img src="{image}" alt="the image">'
        f'<img class="cxr-heat" src="{overlay}" alt="heatmap of {label}"></div>'
        f'<div class="cxr-caption"><span>{html.escape(caption)}</span>'
        f"<span>full color at ±{scale:.1f}</span></div>"
    )


def color_map(heatmap, side):
    """Colors a heatmap: red for evidence for the finding, blue for evidence against it, transparent for none.

    Args:
        heatmap: float array (h, w), logits; 0 is neutral.
        side: int, pixels of the image that the heatmap was computed on, and of the result.

    Returns:
        uint8 array (side, side, 4) and the value, above 0, that has full color.
    """
    scale = max(float(np.abs(heatmap).max()), _LEAST_SCALE)
    strength = resize_maps(heatmap[None], side)[0] / scale
    colors = np.where(strength[..., None] > 0, FOR, AGAINST)
    alpha = 255 * np.abs(strength)
    return np.concatenate([colors, alpha[..., None]], axis=-1).astype("uint8"), scale


def encode_picture(pixels, kind):
    """Returns uint8 pixels as a data URL; `kind` is "PNG" or "JPEG"."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=88)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def show_legend():
    """Returns the legend of the heatmap."""
    return (
        '<div class="cxr-legend"><span>evidence against</span><i></i><span>evidence for</span>'
        "<small>The evidence at each place, as a logit, minus the average over many images. Colors do not outline a "
        "finding: the cells of the model are coarse. A place without color is not proof of health.</small>"
        "</div>"
    )


def show_table(facts, answer, count):
    """Returns a table of the most probable findings; that of a model of synthetic images says what it is worth.

    Args:
        facts: of an `ExportedModel`.
        answer: dict with `probabilities` (14,) and `above_threshold` (14,).
        count: int, how many findings.
    """
    rows, few = [], name_few_positives(facts)
    for index in np.argsort(-answer["probabilities"], kind="stable")[:count]:
        prob, threshold = float(answer["probabilities"][index]), facts["thresholds"][index]
        above = bool(answer["above_threshold"][index])
        name = facts["class_names"][index]
        rows.append(
            f'<tr class="{"cxr-above" if above else ""}" data-finding="{html.escape(name)}" data-prob="{prob:.6f}">'
            f"<td>{html.escape(pretty(name))}</td>"
            f'<td><span class="cxr-bar"><b style="width:{100 * prob:.1f}%"></b>'
            f'<i style="left:{100 * min(threshold, 0.995):.1f}%"></i></span></td>'
            f"<td>{_percent(prob)}</td><td>{prob / max(facts['prevalence'][index], 1e-3):.1f} ×</td>"
            f"<td>{_percent(threshold)}{' *' * (name in few)}</td>"
            f'<td><span class="cxr-tag">{"above" if above else "below"}</span></td></tr>'
        )
    heads = "Finding", "", "Probability", "Lift", "Threshold", ""
    return (
        show_notes([_SYNTHETIC], "warn") * facts["synthetic"]
        + '<div class="cxr-wide"><table class="cxr-table"><thead><tr>'
        + "".join(f"<th>{head}</th>" for head in heads)
        + "</tr></thead>"
        "<tbody>" + "".join(rows) + "</tbody></table></div>"
        '<div class="cxr-hint"><span class="cxr-lift">Lift: the probability divided by the share of training images '
        "with the finding. </span>Thresholds were chosen on validation images"
        '<span class="cxr-bars">; they are the marks on the bars</span>.'
        + f" * Fewer than {FEW_POSITIVES} of these had the finding: this threshold means little." * bool(few)
        + "</div>"
    )


def _percent(share):
    return f"{100 * share:.1f} %" if share >= 0.001 else "&lt; 0.1 %"
