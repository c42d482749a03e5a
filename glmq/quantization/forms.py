"""`--format` of `glmq quantize`: the form in which the checkpoint is written."""

from __future__ import annotations

from typing import Final

from glmq.errors import UsageError
from glmq.spec import Form, QuantType
from glmq.values import check_word

FORMATS: Final = {
    "ascendv1": Form.ASCEND_V1,
    "mindie": Form.MINDIE,
    "compressed-tensors": Form.COMPRESSED_TENSORS,
}
"""The forms as the option spells them."""


def choose_form(name: str | None, *, mindie_format: bool) -> Form:
    """The form that `--format NAME` and `--mindie_format` ask for; ascendV1 without either.

    Raises:
        UsageError: an unknown name, or two forms at once.
    """
    if name is None:
        return Form.MINDIE if mindie_format else Form.ASCEND_V1
    check_word("--format", name, FORMATS)
    form = FORMATS[name]
    if mindie_format and form is not Form.MINDIE:
        raise UsageError(f"--mindie_format True with --format {name}: they name two forms; drop one of them")
    return form


def why_not_in_form(quant_type: QuantType, form: Form) -> str | None:
    """Why linears of that type cannot be written in that form, and what to do; None if they can."""
    if form in quant_type.spec.forms:
        return None
    others = [name for name, other in FORMATS.items() if other in quant_type.spec.forms]
    name = next(name for name, other in FORMATS.items() if other is form)
    return f"{quant_type.value} is not written in the {name} form; pass --format {' or '.join(others)}"
