"""Promise 6 for text to image: pictures show what captions say that were never trained on, in any wording."""

import pytest

from commands import table_of_pipeline


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """What the pipeline's last stage writes, by steps and guidance."""
    rows = table_of_pipeline("pipelines/text-to-image-smoke", tmp_path_factory.mktemp("text-to-image"))
    return {(row["steps"], row["guidance"]): row for row in rows}


@pytest.mark.quality
@pytest.mark.timeout(7200)
def test_attributes_of_held_out_captions_are_right(table):
    best = table[20, "cfg 2.0"]
    for attribute in ("alignment", "colour", "shape", "relation"):
        assert best[f"prompt_{attribute}"] >= 0.9, attribute


@pytest.mark.quality
@pytest.mark.timeout(7200)
def test_guidance_and_steps_trade_as_expected(table):
    """Guidance buys agreement with captions at the cost of variety, which steps buy."""
    free, guided = table[20, "cfg 1.0"], table[20, "cfg 4.0"]
    assert guided["prompt_alignment"] > free["prompt_alignment"]
    assert guided["coverage"] < free["coverage"]
    assert guided["recall"] < free["recall"]
    for guidance in ("cfg 1.0", "cfg 2.0", "cfg 4.0"):
        assert table[5, guidance]["recall"] < table[20, guidance]["recall"]
