import pytest

from files.console import InputError
from prompts import PROMPTS, TASK_PROMPTS, contrast, get_prompt, prompt_label


def test_presets_hold_the_text_once_and_name_their_source():
    assert {"none", "prompt-eol", "pretended-cot", "knowledge", "summarize", "cluster", "classify", "retrieve", "emotion"} <= set(PROMPTS)
    for name, prompt in PROMPTS.items():
        assert prompt.name == name and prompt.source
        assert set(prompt.roles()) == {"query", "document"}
    cluster = get_prompt("cluster").roles()["document"]
    assert cluster["prefix"] + "{text}" + cluster["suffix"] == 'This sentence: "{text}" belongs to the following cluster:'


def test_query_and_document_differ_for_retrieval_alone():
    differing = [name for name, p in PROMPTS.items() if p.roles()["query"] != p.roles()["document"]]
    assert differing == ["retrieve"]


def test_every_task_type_has_a_prompt_that_exists():
    assert set(TASK_PROMPTS.values()) <= set(PROMPTS)
    assert TASK_PROMPTS["Clustering"] == "cluster"


def test_a_template_of_the_users_own():
    assert get_prompt("{x} {text} } in a word:").roles()["query"] == {"prefix": "{x} ", "suffix": " } in a word:"}


def test_a_text_may_be_given_twice():
    prompt = get_prompt("a {text} b {text} c").roles()
    assert prompt["query"] == prompt["document"] == {"prefix": "a ", "middle": " b ", "suffix": " c"}
    assert prompt_label(prompt) == "a {text} b {text} c" and prompt_label(get_prompt("echo").roles()) == "echo"


def test_what_is_no_prompt_is_refused():
    with pytest.raises(InputError, match=r"unknown prompt 'Cluster'.*prompt-eol"):
        get_prompt("Cluster")
    with pytest.raises(InputError, match="has it 3 times"):
        get_prompt("{text} and {text} and {text}")


def test_queries_may_have_another_template():
    roles = get_prompt("cluster", query="query: {text}").roles()
    assert roles == {"query": {"prefix": "query: ", "suffix": ""}, "document": get_prompt("cluster").roles()["document"]}
    assert get_prompt("none", query="retrieve").roles()["query"] == get_prompt("retrieve").roles()["query"]
    with pytest.raises(InputError, match="unknown prompt"):
        get_prompt("none", query="query:")


def test_two_prompts_are_told_apart_in_few_words():
    assert contrast(get_prompt("cluster").roles(), get_prompt("none").roles()) == ("cluster", "none")
    long = "a" * 300 + " {text} " + "b" * 300
    one, other = contrast(get_prompt(long + "!").roles(), get_prompt(long + "?" + "c" * 300).roles())
    assert one == "…" + "b" * 20 + "!" and other == "…" + "b" * 20 + "?" + "c" * 39 + "…"
    assert prompt_label(get_prompt("{text}", query="q {text}").roles()) == "{text} (queries: q {text})"
