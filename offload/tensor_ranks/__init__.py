"""One model on several ranks: each has 1/n of the output rows of every matrix product,
and 1/n of the experts.

CutLayers         the products of a model, and the rows of each that this rank has
CutExperts        stacked experts, and the range of them that this rank has
RowExchange       sends this rank's rows of an output, and waits for those of others
same_bits         whether rows that are computed alone have the bits of the whole
"""
