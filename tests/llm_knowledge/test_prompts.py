import json
import unicodedata

import pytest

from llm_knowledge.errors import InputError
from llm_knowledge.prompts import (
    MAX_TITLE_CHARS,
    RENDERING,
    Renderer,
    Template,
    clean,
    default_template,
    load_template,
    quote,
)
from tests.helpers.knowledge_data import HOSTILE, NOTHING

SCENARIOS = {
    "food": {"name": "Food", "description": ""},
    "kitchen": {"name": "Kit\nchen", "description": ""},
}


def words(texts):
    return [len(text.split()) for text in texts]


def renderer(name="user", level="user", budget=10**6, negative="disliked", count=words):
    template = name if isinstance(name, Template) else load_template(name, level)
    return Renderer(template, SCENARIOS, "liked", negative, count, budget)


def item(title, liked=True, scenario="food"):
    return {"title": title, "liked": liked, "scenario": scenario}


@pytest.mark.parametrize("name", [HOSTILE, "\u2028a\u2029b\x85c\x0bd", "\ud800 lone", "a\r\nb\tc"])
def test_clean_text_is_one_printable_line(name):
    text = clean(name)
    assert len(text.splitlines()) == 1
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in text)
    assert "\u202e" not in text
    text.encode()


def test_clean_keeps_scripts_and_clips_characters():
    for text in ("👩‍👩‍👧 family", "שלום עולם", "日本語", "Kürbis & Söhne"):
        assert clean(text) == text
    long = clean("é" * 10_000)
    assert len(long) == MAX_TITLE_CHARS
    assert long.endswith("…")
    assert clean("") == ""


def test_clean_text_hides_nothing():
    tags = NOTHING["tags"]
    assert clean(f"{tags}He{tags}at\u00ad\u2060\ufeff\u061c\U0001d173\U000e0080 2") == "Heat 2"
    for text in ("می\u200cخواهم", "ක්\u200dෂ", "葛\U000e0100", "❤\ufe0f", "\U0001fae8"):
        assert (
            clean(text) == text
        )  # what scripts and emoji need, and emoji newer than Python's tables
    assert clean("x" * 39 + "\u200b" * 30 + "y", 40) == "x" * 39 + "y"


@pytest.mark.parametrize("text", NOTHING.values(), ids=NOTHING)
def test_text_of_which_nothing_is_seen_is_none(text):
    assert clean(text) == ""
    profile = {"title": text, "categories": [text, "Comedy"]}
    texts = [renderer(name, "item").text(profile) for name in ("item_plain", "item_categories")]
    assert texts == ["Comedy", "Comedy."]


def test_hostile_title_cannot_leave_its_quotes():
    text = renderer().render([{"items": [item(HOSTILE), item("plain")]}])[0]
    line = next(line for line in text.splitlines() if line.startswith("In "))
    start = line.index("liked ") + len("liked ")
    decoder = json.JSONDecoder()
    value, end = decoder.raw_decode(line, start)
    assert value == clean(HOSTILE)
    assert line[end:] == ', "plain".'
    assert len(text.splitlines()) == 3  # instruction, one section, closing


def test_hostile_title_cannot_start_a_line_in_a_plain_prompt():
    data = {"items": [item(HOSTILE), item("a\n\nb")], "met": 9, "liked": 9}
    text = renderer("user_plain").render([data])[0]
    assert text.split("\n") == ["Liked nearly everything.", "", clean(HOSTILE) + ".", "a b."]


@pytest.mark.parametrize(
    ("met", "liked", "words"),
    [
        (40, 40, "nearly everything"),
        (40, 25, "most"),
        (40, 20, "about half"),
        (40, 9, "little"),
        (40, 1, "hardly anything"),
        (1, 1, "most"),
        (1, 0, "little"),
    ],
)
def test_a_prompt_says_how_easily_its_user_is_pleased(met, liked, words):
    profile = {"met": met, "liked": liked, "items": [item("plain", liked > 0)]}
    plain = renderer("user_plain").render([profile])[0]
    assert plain.split("\n\n") == [f"Liked {words}.", *(["plain."] if liked else [])]
    assert f"\nLiked {words}.\nIn " in renderer().render([profile])[0]
    without = {"items": profile["items"]}  # a log with sampled negatives does not know
    assert "Liked" not in renderer("user_plain").render([without])[0]


def test_a_prompt_names_tastes_in_paragraphs_of_their_own():
    tastes = [
        {"category": "noir\n\nNot x", "liked": True},
        {"category": "\u202e", "liked": True},
        {"category": "war" * 99, "liked": False},
    ]
    profile = {"items": [item("p1")], "met": 2, "liked": 2, "tastes": tastes}
    text = renderer("user_tastes").render([profile])[0]
    assert text.split("\n\n") == [
        "Liked most.",
        "Prefers noir Not x.",
        f"Not {'war' * 13}….",
        "p1.",
    ]
    assert renderer("user_tastes").render([{"items": [item("p1")]}])[0] == "p1."


def test_an_item_may_be_named_by_title_and_categories():
    render = renderer("item_categories", "item").render
    texts = render(
        [
            {"title": "Heat", "categories": ["Crime", "War"]},
            {"title": "Heat", "categories": []},
            {"title": "", "categories": ["Crime"]},
            {"title": "", "categories": []},
        ]
    )
    assert texts == ["Heat: Crime, War.", "Heat.", "Crime.", "An item without a title."]


def test_braces_in_titles_are_text():
    text = renderer().render([{"items": [item("{liked} {0.__class__} %s")]}])[0]
    assert '"{liked} {0.__class__} %s"' in text


def test_user_prompt_groups_by_scenario_liked_first():
    data = {"items": [item("n1", False), item("p1"), item("k1", scenario="kitchen"), item("p2")]}
    text = renderer().render([data])[0]
    assert 'In "Food": liked "p1", "p2". disliked "n1".' in text
    assert 'In "Kit chen": liked "k1".' in text
    assert "liked" not in renderer("user_plain").render([data])[0]
    assert renderer("user_plain").render([data])[0] == "p1.\nk1.\np2."


def test_nothing_known():
    assert renderer("user_plain").render([{"items": []}]) == ["Nothing liked yet."]
    assert renderer("user_plain").render([{"items": [item("n", False)]}]) == ["Nothing liked yet."]
    assert "Nothing is known" in renderer().render([{"items": [item("\x00\n")]}])[0]


def test_budget_drops_the_oldest_and_keeps_the_instruction():
    data = {
        "items": [
            item(f"word{i} again", i % 3 > 0, "food" if i % 2 else "kitchen") for i in range(24)
        ]
    }
    whole = renderer().render([data])[0]
    template = load_template("user", "user")
    head = renderer().text({"items": []}).split("Nothing")[0]
    least = words([renderer().text(data, 0)])[0]
    for budget in range(least, words([whole])[0] + 1, 3):
        text = renderer(budget=budget).render([data])[0]
        assert words([text])[0] <= budget
        assert text.startswith(head)
        assert text.endswith(template.closing)
        kept = [i for i in range(24) if f'"word{i} ' in text]
        assert kept == list(range(len(kept)))  # the newest, without a gap
    assert len(kept) >= 20
    assert renderer(budget=words([whole])[0]).render([data]) == [whole]
    with pytest.raises(InputError, match=f"needs {least} tokens"):
        renderer(budget=least - 1).render([data])


def test_budget_of_items_and_scenarios():
    letters = lambda texts: [len(text) for text in texts]  # noqa: E731
    data = {"title": "word " * 300, "categories": ["c"]}
    text = renderer("item_plain", "item", 100, count=letters).render([data])[0]
    assert 80 < len(text) <= 100
    assert renderer("item_plain", "item").render([{"title": "", "categories": ["a", "b"]}]) == [
        "a, b"
    ]
    assert (
        "without a title" in renderer("item", "item").render([{"title": " ", "categories": []}])[0]
    )
    assert json.dumps("T") in renderer("item", "item").render([{"title": "T", "categories": []}])[0]
    others = [
        {"name": f"S{i}", "common_users": 0.5, "agreement": 0.9, "category_similarity": 0.9}
        for i in range(9)
    ]
    facts = {
        "name": "Food",
        "description": "Eat.",
        "events": 3,
        "users": 2,
        "items": 2,
        "rate": 0.5,
        "top_categories": ["a"],
        "distinct_categories": [],
        "others": others,
    }
    whole = renderer("scenario", "scenario").render([facts])[0]
    assert "S8" in whole
    cut = renderer("scenario", "scenario", words([whole])[0] - 30).render([facts])[0]
    assert "S0" in cut
    assert "S8" not in cut
    assert "50% of the events are liked" in cut


def quarters(texts):
    return [-(-len(text) // 4) for text in texts]


LONG = [f"{letter * 149}{letter.upper()}" for letter in "abcdefgh"]
CLIPPED = [f"{letter * 39}…" for letter in "abcdefgh"]


@pytest.mark.parametrize("name", ["item", "item_categories"])
def test_long_categories_do_not_cost_an_item_its_title(name):
    profile = {"title": "Toy Story", "categories": LONG}
    render = lambda budget: renderer(name, "item", budget, count=quarters).render([profile])[0]  # noqa: E731
    whole = render(256)
    assert "Toy Story" in whole
    assert all(category in whole for category in CLIPPED)
    # The budget takes categories, the last first, before it takes anything of the title.
    need = quarters([whole])[0]
    for budget in range(need - 1, need - 70, -11):
        text = render(budget)
        kept = [category in text for category in CLIPPED]
        assert quarters([text])[0] <= budget
        assert "Toy Story" in text
        assert 0 < sum(kept) < 8
        assert kept == sorted(kept, reverse=True)


def test_an_item_without_title_keeps_the_categories_that_fit():
    profile = {"title": "", "categories": LONG}
    text = renderer("item_plain", "item", 35, count=quarters).render([profile])[0]
    assert text == ", ".join(CLIPPED[:3])


def scenario_facts(**update):
    other = {"common_users": 0.5, "agreement": None, "category_similarity": 0.9}
    return {
        "name": "Food",
        "description": "Eat.",
        "events": 3,
        "users": 2,
        "items": 2,
        "rate": 0.5,
        "top_categories": LONG[:6],
        "distinct_categories": ["\u202e", *LONG[5:]],
        "others": [{"name": f"S{i}", **other} for i in range(9)],
        **update,
    }


@pytest.mark.parametrize("name", ["scenario", "scenario_plain"])
def test_budget_of_a_scenario_takes_relations_then_categories(name):
    template = load_template(name, "scenario")
    facts = scenario_facts(description="d" * 600)
    whole, least = renderer(name, "scenario").text(facts), renderer(name, "scenario").text(facts, 0)
    assert f"more than elsewhere: {renderer(name, 'scenario')._say(CLIPPED[5])}, " in whole
    seen = []
    for budget in range(quarters([whole])[0], quarters([least])[0] + 20, -1):
        text = renderer(name, "scenario", budget, count=quarters).render([facts])[0]
        assert quarters([text])[0] <= budget
        assert text.endswith(template.closing)
        told = (sum(c in text for c in CLIPPED[:6]), "more than elsewhere" in text, "S0" in text)
        seen += [told] if told not in seen else []
    assert seen[0] == (6, True, True)
    assert seen == sorted(seen, reverse=True)
    assert {(6, True, False), (6, False, False), (1, False, False)} <= set(seen)


@pytest.mark.parametrize("name", ["scenario", "scenario_plain"])
@pytest.mark.parametrize(
    "absent", ["description", "top_categories", "distinct_categories", "others"]
)
def test_what_a_scenario_lacks_makes_no_paragraph(name, absent):
    """Every paragraph weighs the same in a vector: a line must not become one by chance."""
    said = renderer(name, "scenario").text
    whole = said(scenario_facts()).split("\n")
    lines = said(scenario_facts(**{absent: type(scenario_facts()[absent])()})).split("\n")
    assert "" not in whole + lines
    assert len(lines) == len(whole) - (absent != "description")


def test_only_blank_lines_of_a_template_part_paragraphs(tmp_path):
    own = {
        "body": "{habit}\n{sections}\n{tastes}\n\n{disliked}\n\n{liked}\nEnd.",
        "section": "In {scenario}\n{disliked}\n{liked}\n",
        "liked": "L {titles}\n",
        "disliked": "D {titles}",
        "quoting": "line",
    }
    template = load_template(write(tmp_path / "own.yaml", **own), "user")
    blank = "a\n\nb\r\n\x0b\x85\u2028\u2029\n \nc"
    data = {
        "items": [item(blank), item("k", scenario="kitchen")],
        "tastes": [{"category": blank, "liked": liked} for liked in (True, False)],
    }
    assert renderer(template).text(data).split("\n\n") == [
        "In Food\nL a b c\nIn Kit chen\nL k\nPrefers a b c.",  # of tastes each list ends a paragraph
        "Not a b c.",
        "L a b c, k\nEnd.",
    ]
    own = {"body": "Begin.\n{sections}", "section": "{liked}"}
    template = load_template(write(tmp_path / "own.yaml", **own), "user")
    data = {"items": [item("n", False), item("k", scenario="kitchen")]}
    assert renderer(template).text(data) == 'Begin.\n"k"'


def test_names_of_a_dataset_make_no_paragraph():
    blank = "\n\n".join("xy")
    said = Renderer(
        load_template("scenario_plain", "scenario"), {}, blank, blank, words, 10**6
    ).text(scenario_facts(name=blank, description=blank, top_categories=[blank]))
    assert "\n\n" not in said
    assert said.startswith("x y. x y\nMost x y here: x y.\nX y here more")


def test_a_scenario_that_cannot_fit_is_named():
    facts = scenario_facts(description="d" * 600)
    render = renderer("scenario_plain", "scenario", 100, count=quarters).render
    with pytest.raises(
        InputError,
        match=r"scenario 'food': .*'scenario_plain' needs 152 tokens with"
        r"out categories .*max_tokens is 100; shorten its description",
    ):
        render([scenario_facts(), facts])


def test_shipped_templates_load_and_have_their_defaults():
    for level in ("user", "scenario", "item"):
        for kind in ("encoder", "decoder"):
            template = load_template(default_template(level, kind), level)
            assert bool(template.instruction) == (kind == "decoder")
    assert load_template("user", "user").hash != load_template("user_plain", "user").hash


def test_a_template_that_is_rendered_differently_is_another_one(monkeypatch, tmp_path):
    """Parts and dates of a store are told apart by it, also those made with a template of one's own."""
    own = load_template(write(tmp_path / "own.yaml"), "user")
    before = own.hash
    monkeypatch.setattr("llm_knowledge.prompts.RENDERING", RENDERING + 1)
    assert own.hash != before


def write(path, **update):
    values = {
        "name": "mine",
        "version": 1,
        "level": "user",
        "body": "{liked}",
        "liked": "{titles}",
        "empty": "none",
        **update,
    }
    path.write_text(json.dumps(values))
    return path


def test_own_template_by_path_and_hash_of_every_word(tmp_path):
    one = load_template(write(tmp_path / "a.yaml"), "user")
    two = load_template(str(write(tmp_path / "b.yaml", empty="none!")), "user")
    assert renderer(one).render([{"items": [item("x"), item("y")]}]) == ['"x", "y"']
    assert one.hash != two.hash
    assert one.hash == load_template(write(tmp_path / "c.yaml"), "user").hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body": "{gender}"}, r"body: unknown placeholder \{gender\}; allowed: .*sections"),
        ({"body": "{liked.__class__}"}, "unknown placeholder"),
        ({"body": "{liked!r}"}, "unknown placeholder"),
        ({"body": "{liked:>9}"}, "unknown placeholder"),
        ({"body": "{}"}, "unknown placeholder"),
        ({"body": "{liked"}, r"body: .*write \{\{"),
        ({"instruction": "{titles}"}, "instruction: unknown placeholder"),
        ({"empty": "{liked}"}, "allowed: none"),
        ({"level": "item"}, "level 'item', but 'user'"),
        ({"colour": 1}, "colour: Extra inputs"),
        ({"version": "new"}, "version: "),
        ({"quoting": "line", "instruction": "Do."}, "only safe without instruction"),
    ],
)
def test_bad_templates_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_template(write(tmp_path / "t.yaml", **change), "user")


def test_absent_and_broken_template_files(tmp_path):
    with pytest.raises(InputError, match=r"neither a file nor one of: .*user_plain"):
        load_template("uzer", "user")
    with pytest.raises(InputError, match="neither a file"):
        load_template("../templates/user", "user")
    (tmp_path / "t.yaml").write_text("a: [")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        load_template(tmp_path / "t.yaml", "user")
    (tmp_path / "t.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        load_template(tmp_path / "t.yaml", "user")


def test_quote_is_json():
    assert json.loads(quote('a "b" \\ c')) == 'a "b" \\ c'
