"""Programs that let others compute what we computed, each in a process of its own: python FILE FOLDER CASES OUT DTYPE.

The suite itself never imports transformers or vLLM; these files do, and nothing imports them (train/certificate.py
starts them). They read the folder that was exported and CASES, a folder that certificate.py wrote:

    cases.json          names and kinds, what stands for a picture in vLLM's prompts
    NAME.safetensors    token_T, grid_N3, patch_PX, mm_T (0 text, 1 image, 2 video placeholders), pool_T (the same with
                        start and end tokens)
    NAME-0.png ...      the pictures themselves

and write OUT, a safetensors file with `NAME/...` tensors.
"""
