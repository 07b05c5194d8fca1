"""What finetuning gives to the trainer: packs of examples, choices among labels, the best evaluation, EVA."""
