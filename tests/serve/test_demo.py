import io
import os
import re
import shutil
import stat
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from serve import page

from helpers.study import draw_image

pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements/serve.txt")
pytestmark = pytest.mark.slow


class Counting:
    """A model that counts its predictions, and waits with each while `go` is not set."""

    def __init__(self, model):
        self.model, self.facts, self.n_calls, self.go = model, model.facts, 0, threading.Event()
        self.go.set()

    def predict(self, files):
        self.n_calls += 1
        assert self.go.wait(20)
        return self.model.predict(files)

    def explain(self, files):
        self.n_calls += 1
        return self.model.explain(files)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "ward 7 <b>Doe.png"
    Image.fromarray(draw_image(4, ["Effusion"], size=400)[0]).save(path)
    return path


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """The folder that Gradio keeps uploads in."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def demo(tiny_model, uploads):
    """The page, served, with `model` that counts."""
    from serve.demo import build_demo

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        model = Counting(tiny_model)
        demo = build_demo(model)
        demo.model = model
        demo.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
        yield demo
        demo.close()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: requirements/dev.txt")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(demo, browser):
    """The page in a browser that reaches nothing but it; `wanted` lists its other requests."""
    tab = browser.new_page(viewport={"width": 1280, "height": 1000})
    tab.wanted, tab.errors = [], []

    def pass_on(route):
        if route.request.url.startswith((demo.local_url, "data:", "blob:")):
            route.continue_()
        else:
            tab.wanted.append(route.request.url)
            route.abort()

    tab.route("**/*", pass_on)
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.goto(demo.local_url)
    tab.wait_for_selector("#draw")
    yield tab
    tab.close()


def upload(tab, path):
    tab.wait_for_selector("#image input[type=file]", state="attached")
    tab.set_input_files("#image input[type=file]", path)


def read_table(tab, place):
    tab.wait_for_selector(f"#{place} tr[data-finding]", state="attached")
    rows = tab.locator(f"#{place} tr[data-finding]")
    return [
        (row.get_attribute("data-finding"), float(row.get_attribute("data-prob")), row.text_content())
        for row in rows.all()
    ]


def test_the_page_shows_the_predictions_of_the_model(opened, demo, image, uploads):
    expected = {name: values[0] for name, values in demo.model.model.predict([image.read_bytes()]).items()}
    upload(opened, image)
    shown = read_table(opened, "top5")
    assert [name for name, _, _ in shown] == expected["top5_label"].tolist()
    np.testing.assert_allclose([prob for _, prob, _ in shown], expected["top5_prob"], atol=1e-6)
    for number, (name, prob, text) in enumerate(shown):
        index = demo.model.facts["class_names"].index(name)
        assert f"{100 * prob:.1f} %{expected['top5_lift'][number]:.1f} ×" in text
        assert text.endswith("above" if expected["above_threshold"][index] else "below")
        assert f"{100 * demo.model.facts['thresholds'][index]:.1f} %" in text
    opened.get_by_role("tab", name="All 14").click()
    everything = {name: prob for name, prob, _ in read_table(opened, "all")}
    assert list(everything) == sorted(everything, key=everything.get, reverse=True)
    probs = [everything[name] for name in demo.model.facts["class_names"]]
    np.testing.assert_allclose(probs, expected["probabilities"], atol=1e-6)

    assert "For research and teaching only, not for clinical use." in opened.locator(".cxr-use").text_content()
    assert opened.locator("#finding input").input_value() == page.pretty(shown[0][0])
    assert "synthetic" in opened.locator(".cxr-facts").text_content()
    assert "Doe" not in opened.locator("#stage").text_content()
    left = [path for path in uploads.rglob("*") if path.is_file() and path.stat().st_size]  # Gradio leaves empty files
    assert not left, "an uploaded image is still there"
    assert opened.wanted == [] and opened.errors == []


def test_numbers_of_a_model_of_synthetic_images_say_what_they_are_worth(tiny_model):
    answer = {"probabilities": np.linspace(0, 1, 14), "above_threshold": np.zeros(14, bool)}
    sentence = "these numbers mean nothing for a real radiograph"
    assert sentence in page.show_table(tiny_model.facts | {"synthetic": True}, answer, 5)
    assert sentence not in page.show_table(tiny_model.facts | {"synthetic": False}, answer, 5)


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_the_tables_are_whole(opened, image, width):
    opened.set_viewport_size({"width": width, "height": 844})
    upload(opened, image)
    for place, tab in (("top5", "Five most probable"), ("all", "All 14")):
        opened.get_by_role("tab", name=tab).click()
        read_table(opened, place)
        table = opened.locator(f"#{place} .cxr-wide")
        assert table.evaluate("box => box.scrollWidth - box.clientWidth") == 0
        assert table.get_by_text("Threshold", exact=True).is_visible()
        assert opened.locator(f"#{place} .cxr-note.warn").is_visible()
    assert opened.evaluate("document.documentElement.scrollWidth") == width


def test_another_image_while_the_first_is_predicted_gets_its_own_numbers(opened, demo, image, tmp_path):
    """Its upload was ignored, and the page showed the numbers of the first beside the name of the second."""
    Image.fromarray(draw_image(5, ["Mass"], size=300)[0]).save(tmp_path / "second.png")
    expected = demo.model.model.predict([(tmp_path / "second.png").read_bytes()])["top5_prob"][0]
    n_calls = demo.model.n_calls
    demo.model.go.clear()
    try:
        upload(opened, image)
        while demo.model.n_calls == n_calls:
            opened.wait_for_timeout(20)
        opened.get_by_label("Remove this file").or_(opened.get_by_label("Clear")).first.click()
        upload(opened, tmp_path / "second.png")
        opened.wait_for_timeout(300)
    finally:
        demo.model.go.set()
    opened.wait_for_selector(f"#top5 tr[data-prob='{expected[0]:.6f}']")
    np.testing.assert_allclose([prob for _, prob, _ in read_table(opened, "top5")], expected, atol=1e-6)
    assert "second" in opened.locator("#image").inner_text()
    assert demo.model.n_calls == n_calls + 4  # two images: probabilities and maps


def test_another_finding_and_opacity_change_the_picture_without_another_prediction(opened, demo, image):
    upload(opened, image)
    other = page.pretty(read_table(opened, "top5")[1][0])  # the first is shown already
    opened.wait_for_selector("#stage .cxr-heat")
    n_calls, first = demo.model.n_calls, opened.locator("#stage").screenshot()
    sent = []
    opened.on("request", lambda request: sent.append(request.url))
    opened.locator("#opacity input[type=number]").fill("0")
    opened.locator("#opacity input[type=number]").blur()
    opened.wait_for_function("getComputedStyle(document.querySelector('.cxr-heat')).opacity == 0")
    plain = opened.locator("#stage").screenshot()
    assert plain != first
    gray = np.asarray(Image.open(io.BytesIO(plain)).convert("RGB"))[20:400, 20:400].astype(int)
    assert np.ptp(gray, axis=-1).max() <= 2  # the image alone
    assert sent == []

    opened.locator("#opacity input[type=number]").fill("1")
    opened.locator("#opacity input[type=number]").blur()
    opened.wait_for_function("getComputedStyle(document.querySelector('.cxr-heat')).opacity == 1")
    before = opened.locator(".cxr-heat").get_attribute("src")
    opened.locator("#finding input").click()
    opened.get_by_role("option", name=other).click()
    opened.wait_for_selector(f".cxr-heat[alt='heatmap of {other}']")
    assert opened.locator(".cxr-heat").get_attribute("src") != before
    assert opened.evaluate("getComputedStyle(document.querySelector('.cxr-heat')).opacity") == "1"
    assert demo.model.n_calls == n_calls


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("notes.txt", lambda data: b"hello, I am no image", "neither PNG nor JPEG"),
        ("empty.png", lambda data: b"", "empty"),
        ("cut.png", lambda data: data[: len(data) // 2], "damaged or cut short"),
        ("image.dcm", lambda data: b"no DICOM either", "cannot be read as an image"),
    ],
)
def test_a_file_that_is_not_an_image_gets_a_reason(opened, image, tmp_path, name, change, sentence):
    (tmp_path / name).write_bytes(change(image.read_bytes()))
    upload(opened, tmp_path / name)
    box = opened.wait_for_selector("#notes .cxr-note.error")
    assert sentence in box.text_content()
    assert "Traceback" not in opened.content() and "Error" not in opened.locator("body").inner_text()
    assert opened.locator("tr[data-finding]").count() == 0
    assert opened.locator("#stage .cxr-empty").count() == 1


def test_a_dicom_is_shown_with_what_was_done_to_it(opened, image, tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom: pip install -r requirements/serve.txt")
    pixels = 255 - np.asarray(Image.open(image))
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.ComputedRadiographyImageStorage, "1.2.3"
    dataset.PatientName, dataset.Modality, dataset.PhotometricInterpretation = "Doe^Jane", "CR", "MONOCHROME1"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel = 1
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation, dataset.PixelData = 7, 0, pixels.tobytes()
    dataset.save_as(tmp_path / "image.dcm", enforce_file_format=True)
    upload(opened, tmp_path / "image.dcm")
    assert len(read_table(opened, "top5")) == 5
    assert "MONOCHROME1" in opened.locator("#notes .cxr-note.warn").text_content()
    assert "Jane" not in opened.content()


def test_an_unusual_image_is_answered_with_a_warning(opened, image, tmp_path):
    Image.fromarray(255 - np.asarray(Image.open(image))).save(tmp_path / "negative.png")
    upload(opened, tmp_path / "negative.png")
    assert len(read_table(opened, "top5")) == 5
    assert "inverted" in opened.locator("#notes .cxr-note.warn").text_content()


def test_a_synthetic_image_is_drawn_on_demand(opened):
    opened.click("#draw")
    assert len(read_table(opened, "top5")) == 5
    assert "A synthetic image with" in opened.locator(".cxr-caption").text_content()


def test_the_table_marks_what_is_above_its_threshold(tiny_model):
    probs = np.linspace(0, 1, 14)
    table = page.show_table(tiny_model.facts, {"probabilities": probs, "above_threshold": probs > 0.5}, 14)
    assert table.count("cxr-above") == 7 and "&lt; 0.1 %" in table
    assert re.findall(r'data-finding="(\w+)"', table)[0] == "Hernia"
    assert "Pleural Thickening" in table and " *" not in table
    positives = [-1, 0, 19, 20, *[50] * 10]  # -1: the export does not say
    table = page.show_table(
        tiny_model.facts | {"validation_positives": positives},
        {"probabilities": probs, "above_threshold": probs > 0.5},
        14,
    )
    marked = re.findall(r'data-finding="(\w+)"(?:(?!</tr>).)*% \*</td>', table)
    assert sorted(marked) == ["Cardiomegaly", "Effusion"] and "Fewer than 20 of these had the finding" in table


def test_a_heatmap_is_red_for_evidence_and_blue_for_evidence_against():
    heatmap = np.zeros((4, 4), "float32")
    heatmap[0, 0], heatmap[3, 3] = 4, -2
    picture, scale = page.color_map(heatmap, 32)
    assert scale == 4 and picture.shape == (32, 32, 4)
    assert picture[1, 1].tolist() == [*page.FOR, 255]
    assert picture[-2, -2].tolist() == [*page.AGAINST, 127]
    assert picture[1, -2, 3] == 0
    assert page.color_map(heatmap / 100, 32)[1] == 1  # faint evidence looks faint


def test_an_image_that_was_deleted_meanwhile_is_no_error():
    from serve.demo import _show_finding

    assert _show_finding(None, "Hernia") == page.show_empty()


def test_notes_are_escaped():
    assert "<script>" not in page.show_notes(["<script>alert(1)</script>"], "error")


def test_nothing_is_shared_or_reported(demo):
    assert demo.share_url is None and not demo.share
    assert not demo.analytics_enabled and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert demo.local_url.startswith("http://127.0.0.1:")
    assert not demo.get_api_info()["named_endpoints"]


def test_behind_a_proxy_the_page_finds_itself_and_uploads_lie_where_nobody_else_reads(demo, monkeypatch):
    import importlib

    import gradio
    from serve import demo as module

    monkeypatch.delenv("GRADIO_TEMP_DIR")
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert not gradio.networking.url_ok(demo.local_url)
    importlib.reload(module)
    assert gradio.networking.url_ok(demo.local_url)
    folder = gradio.utils.get_upload_folder()
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700 and os.listdir(folder) == []


def test_a_port_that_is_taken_is_an_error_with_a_remedy(demo, tiny_model, monkeypatch):
    from serve import demo as module

    monkeypatch.setattr("helpers.export.ExportedModel", lambda *given: tiny_model)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--no-browser", "--port", str(demo.server_port)])
    with pytest.raises(SystemExit, match="no free port: leave out --port"):
        module.main()


def test_on_colab_the_page_is_shown_in_the_cell_and_not_shared(tiny_model, monkeypatch):
    """As far as that goes without Colab: what Gradio gives the cell to run, where it takes the machine for Colab."""
    from serve.demo import build_demo

    display = pytest.importorskip("IPython.display")
    cells = []
    monkeypatch.setattr("gradio.utils.colab_check", lambda: True)
    monkeypatch.setattr(display, "display", cells.append)
    demo = build_demo(tiny_model)
    demo.launch(prevent_thread_lock=True, quiet=True, inline=True)
    try:
        assert demo.share_url is None
        assert "proxyPort" in cells[0].data and "1050" in cells[0].data
    finally:
        demo.close()


def test_a_missing_model_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    from serve import demo

    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"(?s)is missing.*make run"):
        demo.main()
