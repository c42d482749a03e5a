"""Declare the operators of torchvision's C++ library, so that its Python modules load where that library cannot.

The registry's torchvision is built for CUDA and does not load beside a CPU torch, but transformers' video processor imports
it. None of these is called for pictures. Put into an environment for tests, with a .pth file that imports it.
"""

import torch

BOX = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
BACK = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
POOLED = "Tensor grad, Tensor rois"
SCALED = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
SHAPE = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask"
)
FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({BOX}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({BOX}) -> (Tensor, Tensor)",
    f"ps_roi_align({BOX}, int sampling_ratio) -> (Tensor, Tensor)",
    f"ps_roi_pool({BOX}) -> (Tensor, Tensor)",
    f"deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {SHAPE}) -> Tensor",
    f"_roi_align_backward({POOLED}, {SCALED}, {BACK}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_pool_backward({POOLED}, Tensor argmax, {SCALED}, {BACK}) -> Tensor",
    f"_ps_roi_align_backward({POOLED}, Tensor channel_mapping, {SCALED}, int sampling_ratio, {BACK}) -> Tensor",
    f"_ps_roi_pool_backward({POOLED}, Tensor channel_mapping, {SCALED}, {BACK}) -> Tensor",
    "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    f"{SHAPE}) -> {FIVE}",
)

LIBRARY = torch.library.Library("torchvision", "DEF")
for operator in OPERATORS:
    LIBRARY.define(operator)
