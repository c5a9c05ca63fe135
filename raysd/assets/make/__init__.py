"""How the bundled assets are made, from nothing but this code and a seed.

In this order, each command resumable by giving it again (about two hours on two cores in all):

    python -m raysd.assets.make.vae --out build/vae                            # the base's autoencoder
    python -m raysd.assets.make.skeleton build/skeleton --vae build/vae        # a pipeline whose U-Net is still random
    python -m raysd.assets.make.renderer build/train --count 12000 --seed 0    # what the base is trained on
    (train the U-Net and the text encoder of build/skeleton on build/train: raysd/assets/tiny-sd)
    python -m raysd.assets.make.judge --out build/judge --vae build/vae --publish raysd/assets/tiny-clip
    python -m raysd.assets.make.score raysd/assets/tiny-sd --count 200 --sheet docs/tiny-sd.png
    python -m raysd.assets.make.sample raysd/assets/sample

`renderer` draws the captioned scenes, `clutter` the pictures that are no scene, `tokenizer` the words of both text encoders.
"""
