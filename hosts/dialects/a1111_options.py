"""A1111's settings: of POST options and of a request's override_settings. Most are fixed here."""

from hosts.http.dialect import DONE, OFF, Rule, harmless, neutral

CLIP_LAYERS = "CLIP_stop_at_last_layers"
FIXED = "options are fixed while the host runs. Send it in override_settings of a request"
NO_CHURN = "samplers add no noise of their own here"
NOT_SAVED = "images are returned and never saved here"
NO_MERGING = "tokens are never merged"
OWN_SPACING = "the scheduler field sets the noise levels"
OWN_VERSION = "images are made as by the newest version"
UNIPC = "unipc has its own settings"
SETTINGS: dict[str, Rule] = {
    "sd_vae": neutral("automatic", "none", reason="the VAE is fixed at start (--vae)"),
    "sd_unet": neutral("automatic", "none", reason="the denoiser is fixed at start"),
    "sd_lora": neutral("none", reason="LoRAs are named in the prompt"),
    "forge_additional_modules": neutral(
        ["Use same choices"], reason="the VAE and the text encoders are fixed at start"
    ),
    "eta_noise_seed_delta": neutral(0, reason="noise depends on the seed only"),
    "randn_source": neutral("cpu", reason="noise is generated on the CPU"),
    "inpainting_mask_weight": neutral(1, reason="masks act fully"),
    "initial_noise_multiplier": neutral(1, reason="noise has the sampler's strength"),
    "img2img_extra_noise": neutral(0, reason="noise has the sampler's strength"),
    "img2img_fix_steps": neutral(*OFF, reason="strength takes its part of the steps"),
    "img2img_color_correction": neutral(*OFF, reason="colours are not changed afterwards"),
    "img2img_background_color": neutral("#ffffff", reason="images have no transparent parts here"),
    "ddim_discretize": neutral("uniform", reason="ddim has evenly spaced steps"),
    "comma_padding_backtrack": neutral(20, reason="long prompts are cut as by default"),
    "emphasis": neutral("original", reason="words are weighted as by default"),
    "sdxl_clip_l_skip": neutral(*OFF, reason="both text encoders skip the same layers"),
    "sd_hypernetwork": neutral("none", reason="hypernetworks are not supported"),
    "extra_networks_default_multiplier": neutral(1, reason="a tag without a weight has 1"),
    "tiling": neutral(*OFF, reason="tiling images are not supported"),
    "face_restoration": neutral(*OFF, reason="face restoration is not supported"),
    "jpeg_quality": neutral(80, reason="files have the host's quality"),
    "webp_lossless": neutral(*OFF, reason="files have the host's quality"),
    "s_min_uncond": neutral(0, reason="guidance is computed at every step"),
    "s_min_uncond_all": neutral(*OFF, reason="guidance is computed at every step"),
    "skip_early_cond": neutral(0, reason="guidance is computed at every step"),
    "eta_ddim": neutral(0, reason="samplers have their own eta"),
    "eta_ancestral": neutral(1, reason="samplers have their own eta"),
    **dict.fromkeys(("s_churn", "s_tmin", "s_tmax"), neutral(0, reason=NO_CHURN)),
    "s_noise": neutral(1, reason=NO_CHURN),
    **dict.fromkeys(("sigma_min", "sigma_max", "rho"), neutral(0, reason=OWN_SPACING)),
    "k_sched_type": neutral("automatic", reason=OWN_SPACING),
    "sd_noise_schedule": neutral("default", reason=OWN_SPACING),
    "always_discard_next_to_last_sigma": neutral(*OFF, reason=OWN_SPACING),
    "sgm_noise_multiplier": neutral(*OFF, reason=OWN_SPACING),
    **dict.fromkeys(("beta_dist_alpha", "beta_dist_beta"), neutral(0.6, reason=OWN_SPACING)),
    "uni_pc_variant": neutral("bh1", reason=UNIPC),
    "uni_pc_skip_type": neutral("time_uniform", reason=UNIPC),
    "uni_pc_order": neutral(3, reason=UNIPC),
    "uni_pc_lower_order_final": neutral(True, "true", reason=UNIPC),
    **dict.fromkeys(
        ("token_merging_ratio", "token_merging_ratio_img2img", "token_merging_ratio_hr"),
        neutral(0, reason=NO_MERGING),
    ),
    "sdxl_crop_top": neutral(0, reason="images are not cropped"),
    "sdxl_crop_left": neutral(0, reason="images are not cropped"),
    **dict.fromkeys(
        ("use_old_emphasis_implementation", "use_old_karras_scheduler_sigmas",
         "no_dpmpp_sde_batch_determinism", "use_old_hires_fix_width_height",
         "dont_fix_second_order_samplers_schedule", "hires_fix_use_firstpass_conds",
         "use_old_scheduling", "use_downcasted_alpha_bar", "refiner_switch_by_sample_steps"),
        neutral(*OFF, reason=OWN_VERSION),
    ),
    **dict.fromkeys(
        ("upcast_attn", "cross_attention_optimization", "fp8_storage", "cache_fp16_weight",
         "pad_cond_uncond", "pad_cond_uncond_v0", "persistent_cond_cache", "batch_cond_uncond",
         "sd_checkpoints_limit", "sd_checkpoints_keep_in_cpu", "sd_checkpoint_cache",
         "sd_vae_checkpoint_cache", "sd_checkpoint_dropdown_use_short", "auto_vae_precision"),
        harmless("the host chooses how it computes"),
    ),
    **dict.fromkeys(
        ("samples_save", "samples_filename_pattern", "grid_save", "grid_format", "return_grid",
         "return_mask", "return_mask_composite", "do_not_add_watermark", "save_images_add_number",
         "save_images_before_face_restoration", "save_images_before_highres_fix",
         "save_images_before_color_correction", "save_mask", "save_mask_composite", "save_init_img",
         "save_incomplete_images", "save_write_log_csv", "save_to_dirs", "grid_save_to_dirs",
         "export_for_4chan", "n_rows", "outdir_samples", "outdir_txt2img_samples",
         "outdir_img2img_samples", "outdir_extras_samples", "outdir_grids", "outdir_txt2img_grids",
         "outdir_img2img_grids", "outdir_save", "outdir_init_images",
         "directories_filename_pattern",
         "temp_dir"),
        harmless(NOT_SAVED),
    ),
    **dict.fromkeys(
        ("show_progressbar", "live_previews_enable", "live_previews_image_format",
         "show_progress_grid", "show_progress_every_n_steps", "show_progress_type",
         "live_preview_content", "live_preview_refresh_period", "live_preview_fast_interrupt",
         "interrupt_after_current", "notification_audio", "notification_volume", "localization",
         "gradio_theme", "quicksettings_list", "ui_tab_order", "hidden_tabs", "js_modal_lightbox",
         "add_model_hash_to_info", "add_model_name_to_info", "add_version_to_infotext",
         "disable_weights_auto_swap", "infotext_styles", "lora_preferred_name",
         "extra_networks_card_text_scale", "disabled_extensions", "restore_config_state_file"),
        harmless("it is about the web interface"),
    ),
    "enable_pnginfo": harmless("PNG files always hold their settings"),
    "sd_checkpoint_hash": harmless("the model is named by its checkpoint"),
}  # fmt: skip
"""Settings with which nothing can be done."""
RULES: dict[str, Rule] = {
    **SETTINGS,
    "sd_model_checkpoint": DONE,
    CLIP_LAYERS: neutral(1, reason=FIXED),
    "samples_format": neutral("png", reason=FIXED),
}
"""POST /sdapi/v1/options: what is so already can be set, and another model where there are
several (hosts/dialects/models.py)."""
