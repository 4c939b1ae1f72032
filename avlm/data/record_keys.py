"""Keys of a record and its turns: those that mean nothing to us are allowed, unknown ones are refused.

A key without a value (null, "", [], {}, or lists and objects of nothing else) says nothing and is always allowed.
"""

from typing import Any

from avlm.config.values import shown

Record = dict[str, Any]  # or a turn, or a part of one: any JSON object

# Keys, in lower case, under which public data sets keep what training does not depend on: where a record comes from and
# what its media are.
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


def says_nothing(value: Any) -> bool:
    if isinstance(value, (str, list, dict)):
        return not value or value in ("[]", "{}", "null")
    return value is None


def check_keys(keys: Record, known: set[str], where: str, harmless: str = "") -> None:
    """ValueError for a key with a value that is neither known nor harmless. ``where``: what has the keys."""
    allowed = set(harmless.split())
    for key, value in keys.items():
        if key in known or str(key).lower() in allowed or _is_empty(value):
            continue
        raise ValueError(
            f"{where} has the key {shown(str(key))!r}, which is not read: remove it, or put it under "
            '"metadata" if nothing depends on it'
        )


def check_whole_file(keys: Record) -> None:
    """ValueError if a record or a turn asks for a part of a file, as NeMo's do by "offset" and "duration"."""
    offset = keys.get("offset")
    if offset:
        raise ValueError(f"offset={shown(offset)} asks for a part of a file: cut the file")
    if says_nothing(offset):
        return
    for key, duration in keys.items():
        if str(key).lower() == "duration" and not says_nothing(duration):
            raise ValueError(
                f"offset={shown(offset)} and duration={shown(duration)} ask for a part of a file: cut the file, or "
                "remove offset if the file is no longer than that"
            )


def _is_empty(value: Any) -> bool:
    """Whether neither the value nor anything in it says something, at any depth."""
    left = [value]
    while left:
        each = left.pop()
        if says_nothing(each):
            continue
        if isinstance(each, dict):
            left += each.values()
        elif isinstance(each, list):
            left += each
        else:
            return False
    return True
