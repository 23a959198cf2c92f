#!/bin/sh
# Full circle: a converted model is fine-tuned with a class added; the result becomes a delta, which
# is converted again and held against what the fine-tuned model computes.
#
#     sh examples/circle.sh FOLDER [OPTION OF finetune.py ...]
set -eu
examples=$(dirname "$0")
backbone=$examples/../fixtures/shapes_panoptic_128/backbone
folder=$1
shift

eomt-convert --checkpoint shapes_panoptic_128 --output "$folder/shapes"
python "$examples/scenes.py" "$folder/scenes"
python "$examples/finetune.py" "$folder/shapes" \
    --train "$folder/scenes/train" --val "$folder/scenes/val" --output "$folder/run" \
    --steps 600 --batch-size 8 --lr 1e-3 --scale 0.5 1.5 --num-points 1024 "$@"
eomt-convert make-delta "$folder/run/model" --backbone "$backbone" --output "$folder/delta"
eomt-convert --delta "$folder/delta" --backbone "$backbone" --output "$folder/model"
eomt-convert record "$folder/run/model" --random 2 --output "$folder/recorded"
eomt-convert verify "$folder/model" --recorded "$folder/recorded"
