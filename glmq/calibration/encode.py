"""A sample as the model is given it."""

from __future__ import annotations

from glmq.calibration.samples import Sample, open_image
from glmq.errors import SampleError
from glmq.model.inputs import ModelInputs, Preprocessor


def encode_sample(preprocessor: Preprocessor, sample: Sample) -> ModelInputs:
    """The sample with its answer, be it given or generated.

    Raises:
        SampleError: the model cannot take it, or its picture cannot be read; names the sample.
    """
    try:
        inputs = preprocessor.encode(open_image(sample), sample.prompt, sample.answer)
    except SampleError as error:
        raise SampleError(f"{sample.name}: {error}") from error
    return inputs if sample.generated is None else inputs.with_answer(sample.generated.ids)
