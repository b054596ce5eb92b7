"""Made-up runs that did what params.yaml says, as results must."""

from bundle_files import evaluation, run_files, sustained, training

from pipeline import config
from pipeline.profiling import score_steps
from pipeline.tracking import records
from results import check

PUBLISHED, JPEG = check.DATA


def result(number=1, *, recipe="blog", data=PUBLISHED, weights=None, settings=(), recipe__tag=None, **tags):
    """A training's record, made with `settings`. A tag's dot is written as two underscores. `data`, `weights`: their
    digests; `recipe__tag`: the recipe that it says instead."""
    chosen = config.load([f"recipe={recipe}", *settings])
    inputs = {"weights": {"digest": weights}, "data": {"digest": data, "limit": chosen.data.limit}}
    plain = training()
    own = plain["tags"] | {"recipe": recipe__tag or recipe, "workload": config.workload(chosen.work, inputs)}
    del own["taints"]
    own |= {key.replace("__", "."): value for key, value in tags.items()}
    experiment = "trainmark-demo" if "fallback" in own else "trainmark"
    facts = plain["facts"] | {"weights_digest": weights}
    return training(number, params=records.run_params(chosen), tags=own, facts=facts, experiment=experiment)


def later_stages(record, *, seconds=60.0, batch=256):
    """What `evaluate` and `sustain` left for it, the convnet repeated for `seconds`."""
    step = score_steps.STEPS[0]
    tags = {
        score_steps.tag(step.name, "workload"): score_steps.workload(step, batch, seconds),
        score_steps.tag(step.name, "precision"): "fp32",
        "sustained.taints": None,
    }
    return evaluation(record), sustained(record, tags=tags, warnings=[])


def whole_result(record):
    return run_files(record, *later_stages(record))
