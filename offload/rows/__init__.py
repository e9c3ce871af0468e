"""From a row to token ids: `text` for texts and prompts, `chat` for messages, by a
template that is checked (`template_check`) and bounded (`template_budget`)."""
