#!/usr/bin/env bash
# All stages in order; each goes on where it was stopped. Needs `pip install .` and the font (see README.md).
set -eu
cd "$(dirname "$0")"
export OMP_WAIT_POLICY=passive # with anything else running, spinning threads made a step up to 20 times slower
python train_autoencoder.py
python train_denoiser.py
python train_denoiser.py --weak
python train_judge.py
python train_scorer.py
python train_detector.py
python train_answerer.py
python measure.py work/clean
python measure.py work/weak
python export.py
