"""What suspended micro-batches hold moves to host memory and back. `evacuation` moves
it, `ownership` says what belongs to one micro-batch alone, by walking its frames and
asking the garbage collector (`referrers`)."""
