"""How the bundled assets are made, from nothing but this code and a seed.

In this order, each command resumable by giving it again (two to three hours on two cores in all):

    python -m raysd.assets.make.vae --out build/vae                            # the base's autoencoder
    python -m raysd.assets.make.skeleton build/skeleton --vae build/vae        # a pipeline whose U-Net is still random
    python -m raysd.assets.make.renderer build/train --count 12000 --seed 0    # what the base is trained on
    raysd train raysd/assets/make/base.toml --name first                       # U-Net and text encoder
    raysd train raysd/assets/make/base.toml --name second --base tiny-sd-base@1 --optim.steps 5000 --optim.ema 0.999
    python -m raysd.assets.make.install tiny-sd-base@2 raysd/assets/tiny-sd    # in fp16
    python -m raysd.assets.make.judge --out build/judge --publish raysd/assets/tiny-clip
    python -m raysd.assets.make.score raysd/assets/tiny-sd --count 200 --sheet docs/tiny-sd.png
    python -m raysd.assets.make.sample raysd/assets/sample

`clutter` draws pictures that are no scene, for the autoencoder; `tokenizer` holds the words of both text encoders.
"""
