"""The decoder: its layers, and how a policy makes each of them run at a width.

Letters in names of tensors, such as `hidden_BLD`, are their dimensions:

- B: sequences of a batch
- L: tokens of a sequence
- D: width of the residual stream (`hidden_size`)
- H: query heads
- G: groups of query heads that share one key and one value head (KV groups)
- E: width of a head (`head_dim`)
- F: neurons of an MLP (`mlp_width`)
- V: vocabulary
- K: choices of a site
- N: blocks, one a layer
- S: slots of a sequence: queries of one head band, padded to equal number

A lower-case letter is part of such a dimension, or several in one: b sequences of the batch, n or m rows (sequences or
tokens, flattened), c rows of a chunk, i inputs and o outputs of a linear map, h heads of a band. `1` is a dimension of
size 1.
"""
