"""The corpus: known concepts hold where they should, and held-out combinations never occur."""

from __future__ import annotations

from random import Random

import pytest
import torch

from gemmascope_plugin.demo import corpus, grammar
from gemmascope_plugin.demo import lexicon as lex
from gemmascope_plugin.demo.tasks import TASK_NAMES, make_task
from gemmascope_plugin.errors import UnknownNameError


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[grammar.Sentence]]:
    rng = Random(0)
    return {
        kind: [make(rng) for _ in range(600)] for kind, (make, _) in grammar.SENTENCE_KINDS.items()
    }


def test_vocabulary_has_every_word_once_and_at_most_2000():
    words = lex.vocabulary()
    assert len(words) == len(set(words)) <= 2000
    assert tuple(words[:4]) == ("<pad>", "<eos>", "<bos>", "<unk>")


def test_every_sentence_uses_known_words_and_one_concept_set_per_word(sentences):
    for examples in sentences.values():
        for s in examples:
            corpus.encode_words(s.words)
            assert len(s.words) == len(s.concepts)


def test_held_out_combinations_never_occur_in_the_corpus(sentences):
    def marked(s: grammar.Sentence, concept: str) -> list[str]:
        return [w for w, c in zip(s.words, s.concepts, strict=True) if concept in c]

    for s in sentences["ioi"]:
        assert not grammar.is_held_out(*marked(s, "first_name"), *marked(s, "second_name"))
    for s in sentences["two_hop"]:
        (city,), (relation,) = marked(s, "city"), marked(s, "relation")
        assert not grammar.is_held_out_fact(city, relation)
    for s in sentences["induction"]:
        assert not grammar.is_held_out(*marked(s, "nonsense_first_time"))


def test_about_a_fifth_of_the_name_pairs_is_held_out():
    pairs = [(a, b) for i, a in enumerate(lex.NAMES) for b in lex.NAMES[:i]]
    share = sum(grammar.is_held_out(*pair) for pair in pairs) / len(pairs)
    assert 0.15 < share < 0.25
    assert all(grammar.is_held_out(a, b) == grammar.is_held_out(b, a) for a, b in pairs)


def test_ioi_names_the_receiver_after_the_giver(sentences):
    for s in sentences["ioi"]:
        roles = {c: w for w, cs in zip(s.words, s.concepts, strict=True) for c in cs}
        assert {roles["giver"], roles["indirect_object"]} == {
            roles["first_name"],
            roles["second_name"],
        }
        assert s.words[-1] == roles["indirect_object"]


def test_the_verb_agrees_with_the_subject_and_not_with_the_attractor(sentences):
    for s in sentences["agreement"]:
        concepts = set().union(*s.concepts)
        assert ("plural_subject" in concepts) == ("plural_verb" in concepts)
        assert (s.words[-2] in ("are", "were")) == ("plural_subject" in concepts)


def test_the_end_year_is_greater(sentences):
    for s in sentences["years"]:
        start, end = (
            int(w)
            for w, c in zip(s.words, s.concepts, strict=True)
            if c & {"start_year", "end_year"}
        )
        assert start < end


def test_two_hop_answers_follow_the_facts():
    s = grammar.two_hop("dallas", "capital")
    assert s.text == "the capital of the state containing dallas is austin"
    assert "in_texas" in s.concepts[s.words.index("dallas")]
    assert "asked_about_texas" in s.concepts[s.words.index("is")]


def test_documents_begin_with_bos_and_end_with_eos_and_padding():
    made = corpus.make_corpus(20, seed=3)
    assert made.tokens.shape == (20, corpus.DOCUMENT_LENGTH)
    assert (made.tokens[:, 0] == 2).all()
    for row in made.tokens.tolist():
        end = row.index(1)
        assert set(row[end + 1 :]) <= {0}


def test_the_same_seed_gives_the_same_corpus_and_another_one_does_not():
    same, again, other = (corpus.make_corpus(5, seed).tokens for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_concept_matrix_has_roles_and_word_identities():
    made = corpus.make_corpus(5, seed=1)
    names, matrix = made.concept_matrix()
    assert matrix.shape == (5, corpus.DOCUMENT_LENGTH, len(names))
    word = lex.vocabulary()[int(made.tokens[0, 1])]
    assert matrix[0, 1, names.index(f"word={word}")]
    d, p, role = next(
        (d, p, role)
        for d, doc in enumerate(made.concepts)
        for p, roles in enumerate(doc)
        for role in roles
    )
    assert matrix[d, p, names.index(role)]


@pytest.mark.parametrize("name", TASK_NAMES)
@pytest.mark.parametrize("split", ["held_out", "train"])
def test_prompts_of_a_task_have_one_length_and_differ(name, split):
    task = make_task(name, split=split, n=32)
    lengths = {len(prompt.split()) for prompt in (*task.clean, *task.corrupt)}
    assert len(lengths) == 1
    assert all(c != k for c, k in zip(task.clean, task.corrupt, strict=True))
    assert make_task(name, split=split, n=32) == task
    assert make_task(name, split=split, n=32, seed=1) != task


def test_held_out_and_train_prompts_are_disjoint():
    for name in TASK_NAMES:
        held_out, train = (set(make_task(name, split=s, n=64).clean) for s in ("held_out", "train"))
        assert not held_out & train


def test_unknown_task_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Unknown task 'iot'.*Did you mean 'ioi'\?"):
        make_task("iot")
