"""`finhpc sweep`: a grid or a search over the settings of pretrain or finetune, on Ray Tune."""
