"""Behind `teacher/prepare.py`: from the tensors of a checkpoint to the bytes of a rank, and back into a model.

configuration: config.json, or one line about what is wrong with it. files: tensor-wise reads of safetensors. dequantise: FP8
blocks to BF16. partition: which rows of which tensor a rank holds, under experts, slices and ZeRO. shard_plan: the files to
write. output: the folder they may go to. shards: writing them, and a rank reading its own. manifest, source: what was made of
what. empty_model, fill: a model without values, and its values put in place.
"""
