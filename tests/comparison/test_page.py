"""The report as one HTML page."""

from html.parser import HTMLParser

import pytest
from made import Store, every_kind, price, sections, two
from test_report import NASTY, PRICES, everything, many

from pipeline.comparison import answer, cells, charts, page, plots


def drawn(found):
    return {
        place: {name: plots.svg(figure) for name, figure in figures.items()}
        for place, figures in charts.charts(found).items()
    }


def html(found):
    return page.html(found, drawn(found))


class Page(HTMLParser):
    """What a page has: elements, ids, addresses; and that they are closed in order."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.outside, self.words = [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [tag] if tag not in self.VOID else []
        for key, value in attributes:
            self.ids += [value] if key == "id" else []
            if key in ("href", "xlink:href", "src"):
                (self.links if tag == "a" else self.outside).append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop() if tag not in self.VOID else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append((self.open[-1] if self.open else "", data))


@pytest.mark.parametrize("found", [Store().compare(), everything().compare(PRICES), many(40).compare()])
def test_a_page_needs_nothing_from_elsewhere(found):
    text = html(found)
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(parsed.tags)
    assert all(address.startswith("#") for address in parsed.outside)
    assert "url(http" not in text and "@import" not in text and "@font-face" not in text
    assert text.startswith("<!doctype html>") and 'name="viewport"' in text


def test_the_answer_and_the_score_stand_before_all_else():
    found = everything().compare()
    words = [data for _, data in Page(html(found)).words if data.strip()]
    assert "".join(words).index(answer.answer(found).split("`")[0]) < "".join(words).index("Score")
    assert words.index("Score") < words.index("finetune on cifar10 with pretrained weights ")


@pytest.mark.parametrize("tainted", [False, True])
def test_every_run_has_its_link(tainted):
    found = every_kind().compare(tainted=tainted)
    expected = {
        run["link"]
        for part in found.parts
        for section in part.sections
        for runs in (
            *((*each.head.runs, *each.head.left_out) for table in section.tables for each in table.rows),
            *(other.runs for other in section.others),
        )
        for run in runs
    }
    assert len(expected) == found.runs and set(Page(html(found)).links) == expected


def test_every_mark_of_a_chart_leads_to_its_run():
    found = two().compare()
    shown = {row.shown["link"] for row in sections(found)[0].tables[0].rows}
    for figures in drawn(found).values():
        for name, svg in figures.items():
            assert set(Page(svg).links) == shown, name


def test_a_source_is_a_link_only_where_it_is_an_address_of_the_web():
    prices = {"GPU A": PRICES["GPU A"], "GPU B": price(per_hour=0.5, source="javascript:x")}
    links = Page(html(two().compare(prices))).links
    assert "https://example.org/a" in links and not any(link.startswith("javascript") for link in links)


def test_a_users_text_is_no_markup():
    store = two(label=NASTY, recipe=NASTY, dataset=NASTY, workload=NASTY, software__torch=NASTY, taints=NASTY)
    store.sustained(2, workload=NASTY, machine="d" * 12, label=NASTY, params={"threads": NASTY}, taints=NASTY)
    for tainted in (False, True):
        text = html(store.compare({NASTY: PRICES["GPU B"]}, tainted=tainted))
        parsed = Page(text)
        assert "script" not in parsed.tags and "<script" not in text
        assert not any("javascript" in link for link in parsed.links)


@pytest.mark.parametrize("kind", ["faster", "none", "few", "parity", "problem", "other"])
def test_what_is_claimed_has_a_mark_as_well_as_a_colour(kind):
    store = everything().add(3, hardware="F", machine="f" * 12, params={"precision": "fp16"}, seconds=1.0)
    assert f'<li class="{kind}"><b>{page.MARKS[kind]}</b>' in html(store.compare())


def test_slower_and_not_established_have_their_marks():
    assert '<li class="slower"><b>▼</b>GPU A takes' in html(two().compare(reference="GPU B"))
    store = Store().add(5, step=60_000).add(5, seconds=9.5, step=60_000, machine="b" * 12, hardware="GPU B")
    assert '<li class="small"><b>≈</b>' in html(store.compare())
    assert len(set(page.MARKS.values())) == 6


def test_a_row_without_claims_and_the_reference_are_marked():
    text = html(everything().compare())
    assert '<tr class="problem">' in text and '<tr class="reference">' in text


def test_a_cell_has_its_notes_in_small_and_its_links():
    cell = page._cell(cells.Cell("3 of 5", ["2 disturbed (load)", "<b>"], [("id", "http://h/?a&b")]))
    assert cell == '<a href="http://h/?a&amp;b">id</a><small>2 disturbed (load)</small><small>&lt;b&gt;</small>'


def test_the_same_runs_make_the_same_page():
    first, second = (everything().compare(PRICES) for _ in range(2))
    assert html(first) == html(second)
