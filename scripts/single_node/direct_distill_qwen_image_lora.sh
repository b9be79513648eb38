#!/usr/bin/env bash
# Direct Distillation of Qwen-Image to four steps: a LoRA.
#
#   bash scripts/single_node/direct_distill_qwen_image_lora.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"
# shellcheck source=scripts/direct.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../direct.sh"

every_method
qwen_image 4
direct pairs_qwen_image
lora
#       flag          published  tiny world
setting exp-name      direct_distill_qwen_image_lora
setting resolution    1328       64
setting shift         0 # the model's own at this size, as its pipeline takes it
setting lora-targets  "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out\\.0,to_add_out,img_mlp\\.net\\.2,img_mod\\.1,txt_mlp\\.net\\.2,txt_mod\\.1"
launch "$@"
