"""loraexample: a Flower app with transformers and PEFT."""
