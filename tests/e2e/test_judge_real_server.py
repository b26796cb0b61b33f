"""A build with a judge behind `transformers serve`: the embedded student, which cannot grade, says whatever it says."""

from pathlib import Path

import pytest

from configs.judging import Judging
from configs.schema import Data
from data.asking import Model, Models
from data.build import build
from data.verify.llm_judge import identity_of
from student.folders import EMBEDDED as STUDENT
from teacher.judge import JudgeEngine
from tests.data.make_run import make_prompt, make_run, make_trace
from tests.e2e.test_http_real_server import serving


@pytest.mark.long
def test_what_is_no_grade_leaves_the_answer_unjudged_and_is_kept_and_counted(tmp_path: Path) -> None:
    sums, essay = make_prompt("What is 2 + 2?"), make_prompt("Why?", "because", verifier="llm_judge")
    run = make_run(tmp_path / "run", [sums, essay], [[make_trace(sums), make_trace(essay, "because")]])
    with serving(STUDENT, tmp_path / "server.log") as url:
        engine = {"base_urls": url, "model": str(STUDENT), "deadline_s": 200.0}
        settings = Judging.model_validate({"engine": engine, "max_tokens": 24, "resample_share": 1.0})
        judge = JudgeEngine(settings)
        model = Model(lambda: identity_of(settings), lambda: judge.codec, lambda: judge)
        data = Data(validation_share=0.0, judging=settings)
        first = build(data, run, num_workers=1, models=Models(judge=model))
    assert first.counts["unjudged_by_reason"] == {"ungraded": 1} and first.counts["kept"] == 1
    assert first.judge is not None and first.judge["replies"] == 2
    assert first.judge["prompt_tokens"] > 500 and 2 <= first.judge["output_tokens"] <= 50
    assert build(data, run, num_workers=1, models=Models(judge=model)).judge == first.judge, "no server is needed any more"
