"""A page for one chest radiograph: the five most probable findings, and a heatmap of the evidence for each.

Usage: python serve/demo.py --model models/densenet121/saved_model [--port 7860]

In a notebook, on Colab too, it appears below the cell: `build_demo(ExportedModel("models/densenet121/saved_model"))
.launch()`. No data leaves the machine that runs the model, and an uploaded image is deleted as soon as it is read.
"""

import argparse
import functools
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "keras" not in sys.modules:
    os.environ["KERAS_BACKEND"] = "tensorflow"  # exported models need no other, whatever else is trained here
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported: it would ask for updates
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Gradio asks its own page whether it is there: not through a proxy, as hospitals have.
_DIRECT = filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"])
os.environ["no_proxy"] = ",".join(_DIRECT)
if "GRADIO_TEMP_DIR" not in os.environ:  # else /tmp/gradio: all can read it, and it belongs to whoever came first
    _UPLOADS = tempfile.TemporaryDirectory(prefix="uploads-")  # removed when Python ends
    os.environ["GRADIO_TEMP_DIR"] = _UPLOADS.name
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

try:
    import gradio as gr
except ModuleNotFoundError as error:
    remedy = "`make demo` installs what the page needs, or pip install -r requirements/serve.txt"
    raise ModuleNotFoundError(f"{error.name} is not installed: {remedy}", name=error.name) from None
from PIL import Image
from serve import page

from helpers.export import check_image, measure_color
from helpers.packing import decode_image, load_image
from helpers.study import PATHOLOGIES, draw_image

_WELCOME = "Warnings about the image appear here."
_SHOWN_SIDE = 768  # pixels of the image on the page
_CHECKED_SIDE = 256  # pixels of the image for the input gate
_STATE_SECONDS = 1800  # after which the server deletes an image and its results
_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # installed fonts: no download


def build_demo(model):
    """Builds the page.

    Args:
        model: an `ExportedModel`.

    Returns:
        A gr.Blocks; its `launch` takes the same arguments as Gradio's own, but makes no public link by default.
    """
    with gr.Blocks(
        title="Chest radiograph findings", analytics_enabled=False, fill_width=True, delete_cache=(600, 600)
    ) as demo:
        known = gr.State(time_to_live=_STATE_SECONDS)
        gr.HTML(page.show_header(model.facts), padding=False)
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                file = gr.File(label="Image: PNG, JPEG or DICOM", height=150, elem_id="image")
                draw = gr.Button("Synthetic image with random findings", size="sm", elem_id="draw")
                stage = gr.HTML(page.show_empty(), elem_id="stage", padding=False)
            with gr.Column(scale=6, min_width=300):
                notes = gr.HTML(page.show_notes([_WELCOME], "fine"), elem_id="notes", padding=False)
                with gr.Tabs():
                    with gr.Tab("Five most probable"):
                        top5 = gr.HTML(elem_id="top5", padding=False)
                    with gr.Tab(f"All {len(model.facts['class_names'])}"):
                        everything = gr.HTML(elem_id="all", padding=False)
                finding = gr.Dropdown([], label="Heatmap of", interactive=True, elem_id="finding")
                opacity = gr.Slider(0, 1, 0.6, step=0.01, label="Opacity of the heatmap", elem_id="opacity")
                gr.HTML(page.show_legend(), padding=False)

        shown = [known, stage, notes, top5, everything, finding]
        # All of them and one at a time: of two at once, the page would show the numbers of one beside the other's name.
        in_order = {"concurrency_id": "image", "trigger_mode": "multiple", "api_visibility": "private"}
        file.upload(functools.partial(_read_upload, model), file, shown, **in_order)
        file.clear(functools.partial(_show_nothing, _WELCOME, "fine"), None, shown, **in_order)
        draw.click(None, None, file, js="() => null", api_visibility="private")
        draw.click(functools.partial(_draw, model), None, shown, **in_order)
        finding.input(_show_finding, [known, finding], stage, api_visibility="private")
        # Runs in the browser only, without the server.
        opacity.change(None, opacity, None, js="v => {document.documentElement.style.setProperty('--cxr-heat', v)}")
    theme = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=_FONT, font_mono=["monospace"]).set(
        block_label_background_fill="transparent",
        block_title_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="*body_text_color",
        block_title_text_color="*body_text_color",
        slider_color="#0f766e",
    )
    options = {"share": False, "theme": theme, "css": page.CSS, "footer_links": [], "height": 1050, "ssr_mode": False}
    demo.launch = functools.partial(demo.launch, max_file_size="140mb", run_history=False, **options)
    return demo


def _read_upload(model, path):
    """Predicts an uploaded file, and deletes it."""
    try:
        return _answer(model, path, "Your image")
    finally:
        Path(path).unlink(missing_ok=True)


def _draw(model):
    """Draws a synthetic image, and predicts it in the same way as an uploaded one."""
    chance = random.Random()
    findings = chance.sample(PATHOLOGIES, chance.choice([1, 1, 2]))
    pixels, _ = draw_image(chance.randrange(10**6), findings, size=512)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        Image.fromarray(pixels).save(path)
        caption = "A synthetic image with " + " and ".join(map(page.pretty, findings))
        return _answer(model, path, caption)


def _answer(model, path, caption):
    """Returns the contents of the page for a file: image and predictions, or the reason why it cannot be read."""
    try:
        data, remarks = load_image(path)
    except (ValueError, OSError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it cannot be opened"
        return _show_nothing(f"This file cannot be read as an image: {reason}.")
    try:
        answer = {name: values[0] for name, values in model.predict([data]).items()}
        explained = model.explain([data])
    except ValueError:
        return _show_nothing("This file cannot be read as an image: it is damaged or cut short.")
    remarks = [f"{remark[:1].upper()}{remark[1:]}." for remark in remarks] + _list_warnings(data)
    image = page.encode_picture(decode_image(data, _SHOWN_SIDE).numpy()[..., 0], "JPEG")
    names = model.facts["class_names"]
    known = {"image": image, "caption": caption, "side": explained["films"].shape[1]}
    known["heatmaps"] = dict(zip(names, explained["heatmaps"][0].transpose(2, 0, 1), strict=True))
    ranked = [names[index] for index in answer["probabilities"].argsort()[::-1]]
    return (
        known,
        _show_finding(known, ranked[0]),
        page.show_notes(remarks, "warn") if remarks else page.show_notes(["Nothing unusual about this image."], "fine"),
        page.show_table(model.facts, answer, 5),
        page.show_table(model.facts, answer, len(ranked)),
        gr.Dropdown([(page.pretty(name), name) for name in ranked], value=ranked[0]),
    )


def _list_warnings(data):
    """Returns the warnings of the input gate for an encoded image."""
    image = decode_image(data, _CHECKED_SIDE).numpy()
    return [warning.reason for warning in check_image(image, measure_color(data))]


def _show_finding(known, finding):
    """Returns the image with the heatmap of another finding, without another prediction."""
    if known is None:
        return page.show_empty()
    return page.show_image(known["image"], known["heatmaps"][finding], known["side"], finding, known["caption"])


def _show_nothing(sentence, kind="error"):
    return None, page.show_empty(), page.show_notes([sentence], kind), "", "", gr.Dropdown([], value=None)


def main():
    """Loads the model and opens the page, on this machine only."""
    from helpers.export import ExportedModel

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/densenet121/saved_model", help="folder of the SavedModel")
    parser.add_argument("--sha256", help="the hash that the model must have")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page")
    arguments = parser.parse_args()
    try:
        model = ExportedModel(Path(arguments.model).resolve(), arguments.sha256)
    except (OSError, ValueError) as error:
        sys.exit(f"{error}\n`make run` trains a model and exports one to models/densenet121/saved_model.")
    try:
        build_demo(model).launch(
            server_name="127.0.0.1", server_port=arguments.port, inbrowser=not arguments.no_browser, max_threads=4
        )
    except (OSError, OverflowError):
        sys.exit("The page found no free port: leave out --port, or give another between 1024 and 65535.")


if __name__ == "__main__":
    main()
