"""lm-eval's `local-completions`: log-likelihoods equal to those of transformers."""

import json
import os

from checks import API, check, finished, started
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

started("lm-eval")
# [[context, continuation, its log-likelihood by transformers, whether it is the likeliest], …]
EXPECTED = json.loads(os.environ["LORAMUX_EXPECTED"])
model = LocalCompletionsAPI(
    base_url=f"{API}/completions",
    model=os.environ["LORAMUX_BASE"],
    tokenizer=os.environ["LORAMUX_BASE_FOLDER"],
    tokenizer_backend="huggingface",
    batch_size=4,
    max_length=2048,
)


@check
def log_likelihoods_are_those_of_transformers() -> str:
    requests = [
        Instance("loglikelihood", {}, (context, continuation), index)
        for index, (context, continuation, _, _) in enumerate(EXPECTED)
    ]
    found = model.loglikelihood(requests)
    worst = max(abs(ours[0] - row[2]) for ours, row in zip(found, EXPECTED, strict=True))
    assert worst < 1e-3
    assert [bool(ours[1]) for ours in found] == [row[3] for row in EXPECTED]
    return f"{len(found)} sums, the worst {worst:.1e} nats away"


@check
def generation_until_a_stop() -> None:
    options = {"until": ["."], "max_gen_toks": 20, "temperature": 0}
    (text,) = model.generate_until([Instance("generate_until", {}, (EXPECTED[0][0], options), 0)])
    assert "." not in text


finished()
