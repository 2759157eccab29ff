"""The shipped detector on texts that its training has not seen."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from transformers import BertModel

from services.contract.errors import InvalidInputError
from services.evaluation.consistency.claims import Source, read_claims
from services.evaluation.consistency.detector import Detector, detect_consistency, load_detector
from services.evaluation.consistency.encoding import CHUNK_PIECES, LAYERS, Encoder, Text
from services.evaluation.consistency.labelled import read_labelled
from services.evaluation.consistency.text import read_words
from services.evaluation.consistency.weights import SHIPPED

ARTICLE = (
    "The harbour town of Velm opened its new ferry terminal on Tuesday. Mayor Ilse Brandt said the building cost "
    "14 million euros, two million less than planned. The first ferry to Korsund left at noon with 310 passengers. "
    "Fishermen had protested against the terminal for three years because it takes up a third of their quay."
)
SUMMARY = "Velm opened a ferry terminal that cost 14 million euros."
INVENTED = "Velm opened a casino designed by the architect Paolo Ricci."


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector()


def test_invented_facts_score_worse_and_are_marked(detector: Detector) -> None:
    right, wrong = detector.detect([(ARTICLE, SUMMARY), (ARTICLE, INVENTED)])
    assert right.score is not None
    assert wrong.score is not None
    assert right.score < wrong.score
    marked = " ".join(INVENTED[span.start : span.end] for span in wrong.spans)
    assert "casino" in marked
    assert "Ricci" in marked
    assert all(span.detector == "consistency" and 0 <= span.score <= 1 for span in wrong.spans)
    assert any("Velm opened its new ferry terminal" in span.explanation for span in wrong.spans)


def test_spans_are_whole_words_in_order_of_any_sentence(detector: Detector) -> None:
    output = f"{SUMMARY} {INVENTED}\nIt sank in 1987."
    [detection] = detector.detect([(ARTICLE, output)])
    starts = {word.start for word in read_words(output)}
    ends = {word.end for word in read_words(output)}
    assert all(span.start in starts and span.end in ends for span in detection.spans)
    places = [(span.start, span.end) for span in detection.spans]
    assert places == sorted(places)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert any(span.kind == "number" and "1987" in output[span.start : span.end] for span in detection.spans)


def test_an_invented_sentence_anywhere_makes_the_output_worse(detector: Detector) -> None:
    right, wrong = detector.detect([(ARTICLE, SUMMARY), (ARTICLE, f"{SUMMARY} {INVENTED}")])
    assert right.score is not None
    assert wrong.score is not None
    assert wrong.score > right.score


def test_saying_a_thing_again_makes_it_no_worse(detector: Detector) -> None:
    once, often = detector.detect([(ARTICLE, SUMMARY), (ARTICLE, " ".join([SUMMARY] * 30))])
    assert once.score is not None
    assert often.score == pytest.approx(once.score, abs=0.05)


def test_nothing_to_judge(detector: Detector) -> None:
    empty, blank, signs, without_source = detector.detect(
        [(ARTICLE, ""), (ARTICLE, " \n"), (ARTICLE, "... --- !!"), ("", SUMMARY)]
    )
    assert empty == blank == signs == (None, [])
    assert without_source.score is not None
    assert without_source.score > 0.5
    assert {span.explanation for span in without_source.spans} == {"The source is empty."}


def test_a_pair_does_not_depend_on_its_neighbours(detector: Detector, news: list[tuple[str, str]]) -> None:
    together = detector.detect([*news[:6], (ARTICLE, SUMMARY), (ARTICLE, "")])
    alone = [detector.detect([pair])[0] for pair in [*news[:6], (ARTICLE, SUMMARY), (ARTICLE, "")]]
    for one, other in zip(together, alone, strict=True):
        # States are kept in float16, and of nearly equal counterparts another may be the best.
        assert one.score == pytest.approx(other.score, abs=5e-3)
        assert [(span.start, span.end) for span in one.spans] == [(span.start, span.end) for span in other.spans]
    assert detector.detect([*news[:6], (ARTICLE, SUMMARY), (ARTICLE, "")]) == together


def test_support_is_found_at_the_end_of_a_long_article(detector: Detector, news: list[tuple[str, str]]) -> None:
    long_article = "\n".join(article for article, _ in news) + "\n" + ARTICLE
    assert len(long_article.split()) > 3000
    near, far, absent = detector.detect([(ARTICLE, SUMMARY), (long_article, SUMMARY), (news[0][0], SUMMARY)])
    assert near.score is not None
    assert far.score is not None
    assert absent.score is not None
    assert far.score < absent.score


@pytest.mark.parametrize(
    "output",
    [
        "word " * 2000,
        "https://example.org/" + "a" * 5000,
        "日本の新しい港が火曜日に開いた。" * 30,
        "🙂 🙂 ferry 🙂",
        "\x00 ferry \ufffd",
    ],
    ids=["endless", "one long word", "Japanese", "emoji", "odd characters"],
)
def test_odd_outputs_are_scored_within_bounds(detector: Detector, output: str) -> None:
    [detection] = detector.detect([(ARTICLE, output)])
    assert detection.score is not None
    assert 0 <= detection.score <= 1
    assert all(span.end <= len(output) for span in detection.spans)


def test_swapped_references_of_unseen_news_score_worse(detector: Detector, news: list[tuple[str, str]]) -> None:
    swapped = [(article, news[index - 1][1]) for index, (article, _) in enumerate(news)]
    right = np.array([detection.score for detection in detector.detect(news)])
    wrong = np.array([detection.score for detection in detector.detect(swapped)])
    assert (wrong > right).mean() >= 0.9


@pytest.mark.slow
def test_scores_follow_the_experts_on_a_set_never_trained_on(detector: Detector, shared_data: Path) -> None:
    examples = [example for example in read_labelled(shared_data) if example.origin == "summeval"][:160]
    scores = [detection.score for detection in detector.detect([(e.document, e.output) for e in examples])]
    correlation = spearmanr([-(example.rating or 0) for example in examples], scores).statistic
    assert correlation >= 0.3


def test_encoder_states_are_nearly_those_of_the_published_model(minilm: Path, encoder: Encoder) -> None:
    sentences = ["The first ferry to Korsund left at noon.", "It carried 310 passengers, she said."]
    [found] = encoder.encode([Text(sentences, [read_words(sentence) for sentence in sentences], {1})])
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    ids = torch.tensor([tokenizer.encode(" ".join(sentences)).ids])
    reference = BertModel.from_pretrained(minilm, add_pooling_layer=False).eval()
    with torch.no_grad():
        hidden = reference(input_ids=ids, output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[layer] for layer in LAYERS], dim=-1)[0, 1:-1]
    states = torch.cat([found[0].states_TD, found[1].states_TD]).float()
    for kept, published in zip(states.chunk(len(LAYERS), -1), expected.chunk(len(LAYERS), -1), strict=True):
        cosine_T = torch.nn.functional.cosine_similarity(kept, published, dim=-1)
        assert cosine_T.min() > 0.998
        assert (kept - published).abs().mean() < 0.03 * published.abs().mean()
    words = [word.text for word in read_words(sentences[1])]
    assert words == ["It", "carried", "310", "passengers", "she", "said"]
    assert [words[owner] for owner in found[1].word_of_piece if owner >= 0] == words


def test_a_sentence_is_encoded_alike_whatever_else_is_wanted(encoder: Encoder, news: list[tuple[str, str]]) -> None:
    source = Source("\n".join(article for article, _ in news[:4]))
    last = len(source.sentences) - 1
    [few], [all_] = (
        encoder.encode([Text(source.sentences, source.words, wanted)]) for wanted in ({last}, set(range(last + 1)))
    )
    assert len(few) < len(all_) == last + 1
    torch.testing.assert_close(few[last].states_TD, all_[last].states_TD, atol=2e-3, rtol=2e-3)
    assert sum(len(part.word_of_piece) for part in all_.values()) > 2 * CHUNK_PIECES


def test_the_passage_holds_what_the_claim_needs() -> None:
    filler = " ".join(f"Sentence {number} is about gardens and rain in the valley." for number in range(80))
    source = Source(f"{filler} {ARTICLE} {filler}")
    [claim] = read_claims("310 passengers took the first ferry.", source=source)
    assert claim.nearest == "The first ferry to Korsund left at noon with 310 passengers."
    assert claim.passage == sorted(claim.passage)
    assert any("310" in source.sentences[index] for index in claim.passage)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no consistency model"):
        detect_consistency([(ARTICLE, SUMMARY)], weights=tmp_path)


def test_the_shipped_model_is_small_and_holds_no_text() -> None:
    files = list(SHIPPED.iterdir())
    assert sum(file.stat().st_size for file in files) < 30e6
    names = {"card.json", "encoder.json", "encoder.safetensors", "network.safetensors", "tokenizer.json"}
    assert {file.name for file in files} == names
