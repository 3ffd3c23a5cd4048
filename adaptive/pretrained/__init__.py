"""Published models in and out: Hugging Face folders and GGUF files of the Llama family.

A model is read tensor by tensor into the arrays that a run of the dense method holds, wherever the mesh puts them; what
`train.py`, `eval.py` and `generate.py` take as a dense run may be a folder or file of this kind as well.
"""
