"""What a server is given."""

from typing import Literal

from configs.section import Section

FormatName = Literal["merged"]
DtypeName = Literal["fp32", "bf16", "fp16"]


class Export(Section):
    formats: tuple[FormatName, ...] = ("merged",)
    dtype: DtypeName = "bf16"
