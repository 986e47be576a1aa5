"""The pictures that a reader can move: what stands in them, and what the script makes of them in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from npmerge.aggregate import learning_alpha, learning_weights, mean
from npmerge.many import Pairing, tournament
from npmerge.report import interactive
from npmerge.report.drawing import Picture
from npmerge.report.interactive import ALIGNED, ALPHA
from npmerge.report.watched import Match, Step, Watched, follow, trail

STATIC = Path(__file__).parent.parent / "book" / "_static"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
LIMIT = 60_000
NAMES = ("along_paths", "box", "neurons", "bracket", "alpha_by_epoch")

pytestmark = pytest.mark.chromium


def plane(w: Tensor) -> Tensor:
    """A loss with its minimum outside the box between (1, 0) and (0, 1)."""
    return (w - torch.tensor([1.2, 1.1], dtype=w.dtype)).square().sum(-1)


def two(x: float, y: float) -> nn.Module:
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[x, y]], dtype=torch.float64)
    return model


def walk(best: int) -> list[Step]:
    """Accuracy falls to `best` halfway, where all images are taken for a 1."""
    return [
        Step(n / 20, best + 4 * abs(n - 10), 0.0, (1,) * 8 if n == 10 else tuple(range(8)))
        for n in range(21)
    ]


def match(round_: int, a: tuple[int, ...], b: tuple[int, ...], *scores: float) -> Match:
    return Match(Pairing(round_, 0, 0, a, b), *scores)


@pytest.fixture(scope="module")
def pictures() -> dict[str, Picture]:
    torch.manual_seed(0)
    a, b = two(1, 0), two(0, 1)
    data = [(torch.eye(2).double(), torch.tensor([1.2, 1.1]).double())]
    trails = {
        name: trail(
            *begin(a, b, lr=0.1), data, steps=20,
            loss=lambda out, batch: 2 * mse_loss(out[:, 0], batch[1]),
        )
        for name, begin in {"np_merge": learning_alpha, "finetune": learning_weights}.items()
    }  # fmt: skip
    correlation = torch.tensor([[0.1, 0.9, 0], [0.8, 0.2, 0], [0, 0, -0.3]])
    return {
        "along_paths": interactive.along_paths(
            {"identity": walk(10), "permute": walk(50)}, torch.rand(8, 1, 8, 8), range(8)
        ),
        "box": interactive.box(a, b, trails, plane),
        "neurons": interactive.neurons(
            torch.rand(3, 8, 8), torch.rand(3, 8, 8), correlation, [1, 0, 2]
        ),
        "bracket": interactive.bracket(
            [
                match(0, (2,), (0,), 90, 91, 93),
                match(0, (1,), (3,), 88, 89, 87),
                match(1, (2, 0), (1, 3), 93, 87, 94),
            ]
        ),
        "alpha_by_epoch": interactive.alpha_by_epoch(
            [{"first": [0, n, 10 - n, 0], "<last>": [n, 10 - n, 0, 0]} for n in range(5)]
        ),
    }


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=browser.ensure(), args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def tab(
    chromium: Browser, pictures: dict[str, Picture], request: pytest.FixtureRequest
) -> Iterator[Page]:
    """A page with every picture; errors of the script and anything fetched from elsewhere fail the test."""
    options = getattr(request, "param", {})
    faults: list[str] = []
    with chromium.new_context(viewport={"width": 390, "height": 844}, **options) as context:
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: faults.append(r.url) if "://page" not in r.url else None)
        page.route(
            "http://page/", lambda r: r.fulfill(body=html(pictures), content_type="text/html")
        )
        page.goto("http://page/")
        yield page
    assert faults == []


def html(pictures: dict[str, Picture]) -> str:
    style, script = (
        (STATIC / f"interactive.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    body = "".join(f'<div id="{name}">{one._repr_html_()}</div>' for name, one in pictures.items())
    return (
        "<!doctype html><html><head><meta charset='utf-8'><link rel='icon' href='data:,'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<style>body {{ margin: 20px }} {style}</style><script>{script}</script></head>"
        f"<body>{body}</body></html>"
    )


def said(tab: Page, name: str) -> str:
    return tab.locator(f"#{name} output").inner_text()


def attribute(tab: Page, name: str, part: str, key: str) -> str:
    return str(tab.locator(f'#{name} [data-part="{part}"]').get_attribute(key))


def height(tab: Page, part: str) -> float:
    """How far below the top of the drawing a neuron stands."""
    places = [
        tab.locator(f"#neurons {one}").bounding_box() for one in (f'[data-part="{part}"]', "svg")
    ]
    return float(places[0]["y"] - places[1]["y"])


def slide(tab: Page, name: str, step: int) -> None:
    tab.locator(f"#{name} input").fill(str(step))


def test_pictures_are_small_and_say_what_they_show(pictures: dict[str, Picture]) -> None:
    assert tuple(pictures) == NAMES
    for picture in pictures.values():
        assert len(picture.html.encode()) < LIMIT
        assert 'role="img"' in picture.html
        assert not re.search(r"https?:|url\(|<img|<link", picture.html)
    alt = {name: repr(picture) for name, picture in pictures.items()}
    assert "Direct averaging 10.0 %, Permute 50.0 %" in alt["along_paths"]
    assert "right in 1 of the first 8" in alt["along_paths"]
    assert "NP Merge stays in the box" in alt["box"]
    assert "Fine-tuning leaves the box at step" in alt["box"]
    assert "by 0.00 on average, with their partners by 0.47; 2 of 3" in alt["neurons"]
    assert "4 networks of 88.0 to 91.0 %; the last merge has 94.0 %" in alt["bracket"]


def test_a_network_with_a_bye_has_its_place() -> None:
    picture = interactive.bracket(
        [match(0, (2,), (0,), 90, 91, 93), match(1, (1,), (2, 0), 88, 93, 94)]
    )
    assert "3 networks of 88.0 to 91.0 %" in picture.alt


def test_many_epochs_are_thinned_out_and_the_ends_kept() -> None:
    picture = interactive.alpha_by_epoch([{"layer": [1, 1]}] * 200)
    assert "Epoch 1:" in picture.alt
    assert "Epoch 200:" in picture.alt
    assert f'max="{interactive.EPOCHS - 1}"' in picture.html


def test_followed_answers_are_those_of_the_models_on_the_line() -> None:
    torch.manual_seed(0)
    a, b = (nn.Linear(4, 3) for _ in range(2))
    images, labels = torch.randn(8, 4), torch.arange(8) % 3
    steps = follow(a, b, [(images, labels)], images, points=3)
    for step in steps:
        answers = mean(a, b, alpha=step.alpha)(images).argmax(1)
        assert step.answers == tuple(answers.tolist())
        assert step.accuracy == pytest.approx(100 * (answers == labels).double().mean().item())


def test_watching_a_tournament_changes_nothing_and_notes_every_merge() -> None:
    models = [two(n, 0) for n in range(4)]
    watched = Watched(lambda a, b, _: mean(a, b), lambda m: m.weight[0, 0].item())
    seen = tournament([lambda m=m: m for m in models], watched, seed=1)
    plain = tournament([lambda m=m: m for m in models], lambda a, b, _: mean(a, b), seed=1)
    assert torch.equal(next(seen.parameters()), next(plain.parameters()))
    assert [m.merged for m in watched.matches] == [(m.a + m.b) / 2 for m in watched.matches]
    assert [m.pairing.round for m in watched.matches] == [0, 0, 1]


def test_np_merge_keeps_to_the_box_and_fine_tuning_need_not(pictures: dict[str, Picture]) -> None:
    a, b = two(1, 0), two(0, 1)
    data = [(torch.eye(2).double(), torch.tensor([1.2, 1.1]).double())]
    loss = lambda out, batch: mse_loss(out[:, 0], batch[1])  # noqa: E731
    kept = torch.tensor(trail(*learning_alpha(a, b, lr=0.1), data, steps=40, loss=loss))
    free = torch.tensor(trail(*learning_weights(a, b, lr=0.1), data, steps=40, loss=loss))
    assert kept.shape == free.shape == (41, 2)
    assert kept[0].tolist() == free[0].tolist() == [0.5, 0.5]
    assert ((kept > 0) & (kept < 1)).all()
    assert (free > 1).any()


@pytest.mark.parametrize("tab", [{"java_script_enabled": False}], indirect=True)
def test_without_the_script_drawings_stand_and_controls_are_hidden(tab: Page) -> None:
    for name in NAMES:
        assert tab.locator(f"#{name} svg").is_visible()
        assert not tab.locator(f"#{name} .npm-controls").is_visible()
    assert "50.0 %" in tab.locator("#along_paths svg").text_content()
    assert "94.0 %" in tab.locator("#bracket svg").text_content()


def test_what_is_drawn_is_what_the_script_shows_first(
    chromium: Browser, pictures: dict[str, Picture]
) -> None:
    drawn = []
    for script in (False, True):
        with chromium.new_context(java_script_enabled=script) as context:
            page = context.new_page()
            page.set_content(html(pictures))
            parts = page.locator("svg [data-part]")
            drawn.append([one.text_content() for one in parts.all()])
            drawn[-1] += [
                one.get_attribute("d") or one.get_attribute("height") for one in parts.all()
            ]
    assert drawn[0] == drawn[1]


def test_alpha_slides_along_the_paths(tab: Page) -> None:
    svg = tab.locator("#along_paths svg")
    assert "✗" in svg.text_content()
    before = attribute(tab, "along_paths", "dot0", "transform")
    slide(tab, "along_paths", 20)
    assert said(tab, "along_paths").startswith(
        f"{ALPHA} = 1.00: Direct averaging 50.0 %, Permute 90.0 %"
    )
    assert "✗" not in svg.text_content()
    assert "Permute: 90.0 %, 8 of 8 right" in svg.text_content()
    assert attribute(tab, "along_paths", "dot0", "transform") != before
    assert tab.get_by_label(f"from {ALIGNED} to A").get_attribute("aria-valuetext") == said(
        tab, "along_paths"
    )


def test_sliders_can_be_used_with_the_keyboard(tab: Page) -> None:
    slider = tab.locator("#box input")
    slider.focus()
    slider.press("Home")
    assert said(tab, "box").startswith(
        "Step 0 of 20: NP Merge inside, loss 0.850; Fine-tuning inside"
    )
    slider.press("ArrowRight")
    assert said(tab, "box").startswith("Step 1 of 20")
    slider.press("End")
    assert "NP Merge inside" in said(tab, "box")
    assert "Fine-tuning outside" in said(tab, "box")
    assert float(attribute(tab, "box", "trail1", "stroke-dashoffset")) == 0


def test_learning_is_played_from_the_start_and_can_be_stopped(tab: Page) -> None:
    play = tab.locator("#box [data-play]")
    play.click()
    assert tab.locator("#box output").get_attribute("aria-live") == "off"
    tab.wait_for_function("document.querySelector('#box input').value > 0")
    assert int(tab.locator("#box input").input_value()) < 20
    play.click()
    stopped = said(tab, "box")
    tab.wait_for_timeout(600)
    assert said(tab, "box") == stopped
    assert tab.locator("#box output").get_attribute("aria-live") == "polite"
    assert play.inner_text() == "Play"


def test_neurons_fly_to_their_partners_and_back(tab: Page) -> None:
    before = height(tab, "neuron0"), height(tab, "neuron1")
    button = tab.get_by_role("button", name="Align")
    button.click()
    assert button.count() == 0
    tab.wait_for_timeout(1500)
    assert (height(tab, "neuron0"), height(tab, "neuron1")) == pytest.approx(before[::-1], abs=0.5)
    assert "by 0.47 on average; 2 of 3" in said(tab, "neurons")
    tab.get_by_role("button", name="Put back", pressed=True).click()
    tab.wait_for_timeout(1500)
    assert (height(tab, "neuron0"), height(tab, "neuron1")) == pytest.approx(before, abs=0.5)


@pytest.mark.parametrize("tab", [{"reduced_motion": "reduce"}], indirect=True)
def test_nothing_moves_by_itself_where_that_is_not_wanted(tab: Page) -> None:
    assert [one.is_visible() for one in tab.locator("[data-play]").all()] == [False] * 3
    before = height(tab, "neuron0")
    tab.get_by_role("button", name="Align").click()
    assert height(tab, "neuron0") > before + 30


@pytest.mark.parametrize("tab", [{"has_touch": True}], indirect=True)
def test_the_bracket_tells_who_was_merged(tab: Page) -> None:
    nodes = tab.locator("#bracket [data-tell]")
    assert nodes.count() == 7
    last = tab.get_by_role("button", name="Round 2, pair 1")
    told = "Round 2, pair 1: the merge of 1, 3 (93.0 %) and the merge of 2, 4 (87.0 %) became one of 94.0 %."
    for point in (last.focus, last.hover, last.tap, lambda: last.press("Enter")):
        nodes.first.dispatch_event("click")
        assert said(tab, "bracket") == "Network 3, as trained: 90.0 %."
        tab.mouse.move(0, 0)
        point()
        assert said(tab, "bracket") == told


def test_alpha_is_shown_by_epoch_and_layer(tab: Page) -> None:
    slide(tab, "alpha_by_epoch", 0)
    assert said(tab, "alpha_by_epoch") == f"Epoch 1: 0 % of {ALPHA} within 0.1 of one half"
    tab.get_by_label("layer").select_option("<last>")
    assert [attribute(tab, "alpha_by_epoch", f"bar{n}", "height") for n in range(4)] == [
        "0",
        "150",
        "0",
        "0",
    ]
    slide(tab, "alpha_by_epoch", 4)
    assert [attribute(tab, "alpha_by_epoch", f"bar{n}", "height") for n in range(4)] == [
        "60",
        "90",
        "0",
        "0",
    ]


@pytest.mark.parametrize(
    "tab", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True, ids=["light", "dark"]
)  # fmt: skip
def test_ink_is_the_colour_of_the_text_around_and_no_picture_is_too_wide(tab: Page) -> None:
    ink = "getComputedStyle(document.querySelector('#bracket svg text')).fill"
    for theme, colour in {"light": "rgb(34, 40, 50)", "dark": "rgb(206, 214, 221)"}.items():
        tab.evaluate("([theme, colour]) => { document.documentElement.dataset.theme = theme;"
                     " document.body.style.color = colour; }", [theme, colour])  # fmt: skip
        assert tab.evaluate(ink) == colour
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    sizes = [box.bounding_box() for box in tab.locator("button, input, select").all()]
    assert min(size["height"] for size in sizes if size) >= 40
