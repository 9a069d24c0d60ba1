"""The papers that this package cites: the one place of their titles."""

from typing import NamedTuple


class Paper(NamedTuple):
    """A paper.

    Attributes:
      authors: As they are cited.
      title: Of the version named by `arxiv` or `venue`.
      venue: Where it was published, or None for a preprint.
      year: Of the publication, or of the preprint; None where it is not known here.
      arxiv: Its number there, or None.
    """

    authors: str
    title: str
    venue: str | None
    year: int | None
    arxiv: str | None

    @property
    def citation(self) -> str:
        """Authors, title, venue and year.

        Example:
          >>> PAPERS["sam"].citation
          'Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization,
          ICLR 2021'
        """
        place = " ".join(str(part) for part in (self.venue, self.year) if part)
        return ", ".join(part for part in (self.authors, self.title, place) if part)


# By the name of the transform or loss, or of what else they are cited for.
PAPERS = {
    "lpa": Paper(
        "Hua Li",
        "Learning to Perturb Hidden Representations for Generalizable Deep Learning",
        None,
        2026,
        "2605.29525",
    ),
    "lpg": Paper(
        "Hua Li",
        "Gradient Perturbation: Learning to Perturb Gradients for Adaptive Training",
        None,
        2026,
        "2605.29494",
    ),
    "lpl": Paper(
        "Mengyang Li, Fengguang Su, Ou Wu and Ji Zhang",
        "Class-Level Logit Perturbation",
        "TNNLS",
        None,
        "2209.05668",
    ),
    "manifold_mixup": Paper(
        "Verma et al.",
        "Manifold Mixup: Better Representations by Interpolating Hidden States",
        "ICML",
        2019,
        "1806.05236",
    ),
    "mixup": Paper(
        "Zhang et al.",
        "mixup: Beyond Empirical Risk Minimization",
        "ICLR",
        2018,
        "1710.09412",
    ),
    "cutmix": Paper(
        "Yun et al.",
        "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
        "ICCV",
        2019,
        "1905.04899",
    ),
    "mixup_cutmix": Paper(
        "Touvron et al.",
        "Training data-efficient image transformers & distillation through attention",
        "ICML",
        2021,
        "2012.12877",
    ),
    "cutout": Paper(
        "DeVries and Taylor",
        "Improved Regularization of Convolutional Neural Networks with Cutout",
        None,
        2017,
        "1708.04552",
    ),
    "dropout": Paper(
        "Srivastava et al.",
        "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
        "JMLR",
        2014,
        None,
    ),
    "dropblock": Paper(
        "Ghiasi, Lin and Le",
        "DropBlock: A regularization method for convolutional networks",
        "NeurIPS",
        2018,
        "1810.12890",
    ),
    "drop_path": Paper(
        "Huang et al.",
        "Deep Networks with Stochastic Depth",
        "ECCV",
        2016,
        "1603.09382",
    ),
    "fractalnet": Paper(
        "Larsson, Maire and Shakhnarovich",
        "FractalNet: Ultra-Deep Neural Networks without Residuals",
        "ICLR",
        2017,
        "1605.07648",
    ),
    "mixstyle": Paper(
        "Zhou et al.",
        "Domain Generalization with MixStyle",
        "ICLR",
        2021,
        "2104.02008",
    ),
    "coral": Paper(
        "Sun and Saenko",
        "Deep CORAL: Correlation Alignment for Deep Domain Adaptation",
        "ECCV Workshops",
        2016,
        "1607.01719",
    ),
    "mmd": Paper(
        "Li et al.",
        "Domain Generalization with Adversarial Feature Learning",
        "CVPR",
        2018,
        None,
    ),
    "dann": Paper(
        "Ganin et al.",
        "Domain-Adversarial Training of Neural Networks",
        "JMLR",
        2016,
        "1505.07818",
    ),
    "group_dro": Paper(
        "Sagawa et al.",
        "Distributionally Robust Neural Networks",
        "ICLR",
        2020,
        "1911.08731",
    ),
    "vrex": Paper(
        "Krueger et al.",
        "Out-of-Distribution Generalization via Risk Extrapolation (REx)",
        "ICML",
        2021,
        "2003.00688",
    ),
    "irm": Paper("Arjovsky et al.", "Invariant Risk Minimization", None, 2019, "1907.02893"),
    "rsc": Paper(
        "Huang et al.",
        "Self-Challenging Improves Cross-Domain Generalization",
        "ECCV",
        2020,
        "2007.02454",
    ),
    "domain_mixup": Paper(
        "Yan et al.",
        "Improve Unsupervised Domain Adaptation with Mixup Training",
        None,
        2020,
        "2001.00677",
    ),
    "shake": Paper("Gastaldi", "Shake-Shake regularization", None, 2017, "1705.07485"),
    "fgsm": Paper(
        "Goodfellow, Shlens and Szegedy",
        "Explaining and Harnessing Adversarial Examples",
        "ICLR",
        2015,
        "1412.6572",
    ),
    "pgd": Paper(
        "Madry et al.",
        "Towards Deep Learning Models Resistant to Adversarial Attacks",
        "ICLR",
        2018,
        "1706.06083",
    ),
    "label_smoothing": Paper(
        "Szegedy et al.",
        "Rethinking the Inception Architecture for Computer Vision",
        "CVPR",
        2016,
        "1512.00567",
    ),
    "disturb_label": Paper(
        "Xie et al.",
        "DisturbLabel: Regularizing CNN on the Loss Layer",
        "CVPR",
        2016,
        "1605.00055",
    ),
    "logit_adjustment": Paper(
        "Menon et al.",
        "Long-tail learning via logit adjustment",
        "ICLR",
        2021,
        "2007.07314",
    ),
    "ldam": Paper(
        "Cao et al.",
        "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
        "NeurIPS",
        2019,
        "1906.07413",
    ),
    "additive_margin": Paper(
        "Wang et al.",
        "Additive Margin Softmax for Face Verification",
        None,
        2018,
        "1801.05599",
    ),
    "cosface": Paper(
        "Wang et al.",
        "CosFace: Large Margin Cosine Loss for Deep Face Recognition",
        "CVPR",
        2018,
        "1801.09414",
    ),
    "large_margin": Paper(
        "Liu et al.",
        "Large-Margin Softmax Loss for Convolutional Neural Networks",
        "ICML",
        2016,
        "1612.02295",
    ),
    "isda": Paper(
        "Wang et al.",
        "Implicit Semantic Data Augmentation for Deep Networks",
        "NeurIPS",
        2019,
        "1909.12220",
    ),
    "isda_journal": Paper(
        "Wang et al.",
        "Regularizing Deep Networks with Semantic Data Augmentation",
        "TPAMI",
        2021,
        "2007.10538",
    ),
    "reweight": Paper(
        "Cui et al.",
        "Class-Balanced Loss Based on Effective Number of Samples",
        "CVPR",
        2019,
        "1901.05555",
    ),
    "elr": Paper(
        "Liu et al.",
        "Early-Learning Regularization Prevents Memorization of Noisy Labels",
        "NeurIPS",
        2020,
        "2007.00151",
    ),
    "gradient_clipping": Paper(
        "Pascanu, Mikolov and Bengio",
        "On the difficulty of training recurrent neural networks",
        "ICML",
        2013,
        "1211.5063",
    ),
    "gradient_noise": Paper(
        "Neelakantan et al.",
        "Adding Gradient Noise Improves Learning for Very Deep Networks",
        None,
        2015,
        "1511.06807",
    ),
    "sam": Paper(
        "Foret et al.",
        "Sharpness-Aware Minimization for Efficiently Improving Generalization",
        "ICLR",
        2021,
        "2010.01412",
    ),
    "asam": Paper(
        "Kwon et al.",
        "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural "
        "Networks",
        "ICML",
        2021,
        "2102.11600",
    ),
    "softmax_focal_loss": Paper(
        "Lin et al.", "Focal Loss for Dense Object Detection", "ICCV", 2017, "1708.02002"
    ),
    "generalized_cross_entropy": Paper(
        "Zhang and Sabuncu",
        "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
        "NeurIPS",
        2018,
        "1805.07836",
    ),
    "class_aware": Paper(
        "Shen et al.",
        "Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks",
        "ECCV",
        2016,
        "1512.05830",
    ),
    "asymmetric": Paper(
        "Patrini et al.",
        "Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach",
        "CVPR",
        2017,
        "1609.03683",
    ),
    "human": Paper(
        "Wei et al.",
        "Learning with Noisy Labels Revisited: A Study Using Real-World Human Annotations",
        "ICLR",
        2022,
        "2110.12088",
    ),
    "class_groups": Paper(
        "Liu et al.",
        "Large-Scale Long-Tailed Recognition in an Open World",
        "CVPR",
        2019,
        "1904.05160",
    ),
    "calibration": Paper(
        "Guo et al.", "On Calibration of Modern Neural Networks", "ICML", 2017, "1706.04599"
    ),
    "corruptions": Paper(
        "Hendrycks and Dietterich",
        "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
        "ICLR",
        2019,
        "1903.12261",
    ),
    "optuna": Paper(
        "Akiba et al.",
        "Optuna: A Next-generation Hyperparameter Optimization Framework",
        "KDD",
        2019,
        "1907.10902",
    ),
    "batch_norm": Paper(
        "Ioffe and Szegedy",
        "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate "
        "Shift",
        "ICML",
        2015,
        "1502.03167",
    ),
    "group_norm": Paper("Wu and He", "Group Normalization", "ECCV", 2018, "1803.08494"),
    "resnet": Paper(
        "He et al.", "Deep Residual Learning for Image Recognition", "CVPR", 2016, "1512.03385"
    ),
    "preact_resnet": Paper(
        "He et al.", "Identity Mappings in Deep Residual Networks", "ECCV", 2016, "1603.05027"
    ),
    "wide_resnet": Paper(
        "Zagoruyko and Komodakis", "Wide Residual Networks", "BMVC", 2016, "1605.07146"
    ),
    "squeeze_excite": Paper(
        "Hu et al.", "Squeeze-and-Excitation Networks", "CVPR", 2018, "1709.01507"
    ),
    "efficientnet": Paper(
        "Tan and Le",
        "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
        "ICML",
        2019,
        "1905.11946",
    ),
    "inverted_block": Paper(
        "Sandler et al.",
        "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
        "CVPR",
        2018,
        "1801.04381",
    ),
    "vit": Paper(
        "Dosovitskiy et al.",
        "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        "ICLR",
        2021,
        "2010.11929",
    ),
    "convnext": Paper("Liu et al.", "A ConvNet for the 2020s", "CVPR", 2022, "2201.03545"),
    "resized_crop": Paper(
        "Szegedy et al.", "Going Deeper with Convolutions", "CVPR", 2015, "1409.4842"
    ),
    "rand_augment": Paper(
        "Cubuk et al.",
        "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space",
        "NeurIPS",
        2020,
        "1909.13719",
    ),
    "random_erasing": Paper(
        "Zhong et al.", "Random Erasing Data Augmentation", "AAAI", 2020, "1708.04896"
    ),
    "domainbed": Paper(
        "Gulrajani and Lopez-Paz",
        "In Search of Lost Domain Generalization",
        "ICLR",
        2021,
        "2007.01434",
    ),
    "swad": Paper(
        "Cha et al.",
        "SWAD: Domain Generalization by Seeking Flat Minima",
        "NeurIPS",
        2021,
        "2102.08604",
    ),
    "rotated_mnist": Paper(
        "Ghifary et al.",
        "Domain Generalization for Object Recognition with Multi-task Autoencoders",
        "ICCV",
        2015,
        "1508.07680",
    ),
}
