"""The report as one HTML page."""

from html.parser import HTMLParser

import pytest
from made import HOSTILE, PRICES, every_kind, everything, price, sections, two

from pipeline.comparison import answer, charts, page, plots


def draw(comparison):
    return {
        folder: {name: plots.svg(figure) for name, figure in figures.items()}
        for folder, figures in charts.charts(comparison).items()
    }


class Page(HTMLParser):
    """What a page has: tags, addresses and words. Asserts that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.resources, self.words = [], set(), [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open += [tag] if tag != "meta" else []
        for key, value in attributes:
            if key in ("href", "xlink:href", "src"):
                (self.links if tag == "a" else self.resources).append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_data(self, data):
        self.words += [data] if data.strip() else []


def test_a_page_needs_nothing_from_elsewhere_and_opens_with_the_answer_and_the_score():
    comparison = everything().compare(PRICES)
    text = page.html(comparison, draw(comparison))
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image"} & parsed.tags
    assert all(address.startswith("#") for address in parsed.resources)
    assert "url(http" not in text and "@import" not in text and "@font-face" not in text
    assert text.startswith("<!doctype html>") and 'name="viewport"' in text
    words = "".join(parsed.words)
    assert words.index(answer.answer(comparison).split("`")[0]) < words.index("Score") < words.index("same settings")


@pytest.mark.parametrize("tainted", [False, True])
def test_every_run_has_its_link(tainted):
    comparison = every_kind().compare(tainted=tainted)
    sections = [section for part in comparison.parts for section in part.sections]
    rows = [row.head for section in sections for table in section.tables for row in table.rows]
    runs = [run for head in rows for run in (*head.runs, *head.left_out)]
    runs += [run for section in sections for other in section.others for run in other.runs]
    links = {run["link"] for run in runs}
    assert len(links) == comparison.runs and set(Page(page.html(comparison, {})).links) == links


def test_every_mark_of_a_chart_leads_to_its_run():
    comparison = two().compare()
    links = {row.shown["link"] for row in sections(comparison)[0].tables[0].rows}
    (svgs,) = draw(comparison).values()
    assert svgs and all(set(Page(svg).links) == links for svg in svgs.values())


def test_a_source_is_a_link_only_if_it_is_a_web_address():
    prices = {"GPU A": PRICES["GPU A"], "GPU B": price(per_hour=0.5, source="javascript:x")}
    links = Page(page.html(two().compare(prices), {})).links
    assert "https://example.org/a" in links and not any(link.startswith("javascript") for link in links)


@pytest.mark.parametrize("tainted", [False, True])
def test_a_users_text_is_no_markup(tainted):
    texts = dict.fromkeys(("label", "recipe", "dataset", "workload", "software__torch", "taints"), HOSTILE)
    store = two(**texts).sustained(2, machine="d" * 12, params={"threads": HOSTILE}, **texts)
    comparison = store.compare({HOSTILE: PRICES["GPU B"]}, tainted=tainted)
    text = page.html(comparison, draw(comparison))
    parsed = Page(text)
    assert "script" not in parsed.tags and "<script" not in text
    assert not any("javascript" in link for link in parsed.links)


def test_every_claim_has_a_mark_as_well_as_a_colour():
    store = everything().add(3, hardware="F", machine="f" * 12, params={"precision": "fp16"}, seconds=1.0)
    for comparison, kinds in (
        (store.compare(), ("faster", "none", "few", "parity", "problem", "other")),
        (two().compare(reference="GPU B"), ("slower",)),
    ):
        text = page.html(comparison, {})
        assert all(f'<li class="{kind}"><b>{page.MARKS[kind]}</b>' in text for kind in kinds)
    assert len(set(page.MARKS.values())) == 6
