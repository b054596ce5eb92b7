"""The report as one HTML page."""

from html.parser import HTMLParser

import pytest
from made import Store, every_kind, price, sections, two
from test_report import NASTY, PRICES, everything, many

from pipeline.comparison import answer, charts, page, plots


def drawn(comparison):
    return {
        place: {name: plots.svg(figure) for name, figure in figures.items()}
        for place, figures in charts.charts(comparison).items()
    }


def html(comparison):
    return page.html(comparison, drawn(comparison))


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


@pytest.mark.parametrize("comparison", [Store().compare(), everything().compare(PRICES), many(40).compare()])
def test_a_page_needs_nothing_from_elsewhere(comparison):
    text = html(comparison)
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(parsed.tags)
    assert all(address.startswith("#") for address in parsed.outside)
    assert "url(http" not in text and "@import" not in text and "@font-face" not in text
    assert text.startswith("<!doctype html>") and 'name="viewport"' in text


def test_the_answer_and_the_score_stand_before_all_else():
    comparison = everything().compare()
    words = [data for _, data in Page(html(comparison)).words if data.strip()]
    assert "".join(words).index(answer.answer(comparison).split("`")[0]) < "".join(words).index("Score")
    assert words.index("Score") < words.index("finetune on cifar10 with pretrained weights ")


@pytest.mark.parametrize("tainted", [False, True])
def test_every_run_has_its_link(tainted):
    comparison = every_kind().compare(tainted=tainted)
    expected = {
        run["link"]
        for part in comparison.parts
        for section in part.sections
        for runs in (
            *((*each.head.runs, *each.head.left_out) for table in section.tables for each in table.rows),
            *(other.runs for other in section.others),
        )
        for run in runs
    }
    assert len(expected) == comparison.runs and set(Page(html(comparison)).links) == expected


def test_every_mark_of_a_chart_leads_to_its_run():
    comparison = two().compare()
    shown = {row.shown["link"] for row in sections(comparison)[0].tables[0].rows}
    for figures in drawn(comparison).values():
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


def test_every_claim_has_a_mark_as_well_as_a_colour():
    store = everything().add(3, hardware="F", machine="f" * 12, params={"precision": "fp16"}, seconds=1.0)
    for comparison, kinds in (
        (store.compare(), ("faster", "none", "few", "parity", "problem", "other")),
        (two().compare(reference="GPU B"), ("slower",)),
    ):
        text = page.html(comparison, {})
        assert all(f'<li class="{kind}"><b>{page.MARKS[kind]}</b>' in text for kind in kinds)
    assert len(set(page.MARKS.values())) == 6
