"""Rendered streets and rooms, in the layouts of Cityscapes and NYUv2: data where there is none."""
