"""What a model does with rows: scores, completes, embeds, classifies them."""
