"""Keys of public sets that a record and its turns may have and that change nothing in them."""

# Keys that are left aside, in lower case. Of a record: where it comes from and what its media are, which changes
# nothing in it.
HARMLESS = """
    id idx index key uid uuid guid name no number split part subset fold task tasks task_type task_name type kind
    category categories subcategory topic topics domain tag tags skill difficulty level quality score scores rating
    source sources dataset dataset_name data_source origin original_id conversation_id conv_id session_id sample_id
    question_id answer_id question_type answer_type image_id image_ids img_id video_id audio_id clip_id utt_id
    utterance_id segment_id speaker speaker_id client_id gender age accent accents locale variant lang language
    languages src_lang tgt_lang model model_id model_name generator author license licence copyright url urls link
    date time timestamp created created_at updated_at version revision width height image_size image_width
    image_height size sizes resolution orig_size original_size ratio aspect_ratio duration durations length lengths
    num_tokens num_turns num_rounds token_count tokens fps num_frames frame_count nframes sampling_rate sample_rate
    channels format caption captions up_votes down_votes metadata meta meta_info extra extra_info info
    additional_info comment comments note notes facts md5 sha1 sha256 hash filename file_name taxonomy_path
    prompt_id doc_id document_id qid dialog_id dialogue_id example_id instance_id row_id conversation_hash hashed_ip
    country state header turn toxic redacted openai_moderation detoxify_moderation moderation is_truncated keyword
    keywords label entity entities n_frames num_clips num_images choice_list width_list height_list path sentence
    segment chapter_id text skip_prompt_formatting title views avatarurl custom_instruction full_topic channel
    ground_truth solution questionid docid fig_caption __key__ __index__
"""
HARMLESS_OF_TURN = """
    id idx index key uid turn turn_id message_id parent_id timestamp time date created_at model source lang language
    duration metadata meta extra info comment note tokens num_tokens turn_identifier hashed_ip country state header
    toxic redacted openai_moderation detoxify_moderation markdown name
"""
