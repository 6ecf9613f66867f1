"""A plugin of pytest (-p torchvision_operators) that lets a torchvision built for CUDA be imported beside a PyTorch for CPUs.

torchvision looks two of its operators up when it is imported, which are there only where its library could be loaded. Nothing in the
tests calls them: timm, which asks for torchvision, makes vision transformers and ResNets without it.
"""

import torch

for operator in ("nms", "qnms"):
    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
