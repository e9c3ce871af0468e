"""Many micro-batches through one pass of the weights. `sweep` is what users hold,
`loop` chooses who runs next, `entry` stops a micro-batch at each module; `coalescing`
joins the products of several; `turn` and `owner` say which thread may run the model."""
