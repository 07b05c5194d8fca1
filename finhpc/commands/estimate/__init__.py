"""`finhpc estimate`: memory, time and devices that a pretraining or a finetuning needs."""
