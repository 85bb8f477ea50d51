//! `MESSAGE_ID=` of the events that administrators look for (sd-messages(3)). socket-proxyd(8)
//! lists them.
//!
//! Each id is random. It stays with its event, whatever the words of the message become.

/// The proxy starts COMMAND for a client.
pub const COMMAND_STARTING: &str = "36ccf0daa6cd849740dfa2a5cfed4a1f";
/// COMMAND is ready.
pub const COMMAND_READY: &str = "89878c9090522e44a3afaf792a676e23";
/// The proxy stops COMMAND.
pub const COMMAND_STOPPING: &str = "cbecc91c4488330062335bdeabc295c1";
/// COMMAND is frozen.
pub const COMMAND_FROZEN: &str = "58ca6999ac2a45e987f50c694893eff9";
/// COMMAND is thawed for a client.
pub const COMMAND_THAWED: &str = "3a6c7b6caee64a2aa5fd8cabc8a67a10";
/// COMMAND has ended by itself, or does not become ready.
pub const COMMAND_FAILED: &str = "1cd0b206fc286f373269868d69ae34a2";
/// `--connections-max=` is reached.
pub const CONNECTION_LIMIT: &str = "0f85d754135edae8aa68200a2efeb3a1";
/// Clients wait in the kernel because there are no descriptors for them.
pub const OUT_OF_DESCRIPTORS: &str = "5aa22bf6ce80481768b34e722eef0f64";
/// A client is closed because there is no backend.
pub const BACKEND_UNREACHABLE: &str = "0d2a00026ad2fba7e138e2f7e91c3af7";
/// Open connections are in the descriptor store.
pub const HANDOVER_STORED: &str = "3c3e15607f836fa507eecb8268cba51f";
/// Connections of the previous process continue.
pub const HANDOVER_RECOVERED: &str = "320e0d8687e35c2d70b19193b46b3283";
/// Connections could not be stored or restored.
pub const HANDOVER_LOST: &str = "15f5d731fd9af4205dae86bf19f3e719";
/// A connection is closed by `--connection-idle-time=`.
pub const CONNECTION_IDLE: &str = "483575f1694453dbf9120fbee16cdbcb";
/// A panic.
pub const INTERNAL_ERROR: &str = "51a3187edbc2df45a03bf60f25909e1d";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn the_manual_lists_each_id() {
        let (source, manual) =
            (include_str!("message_id.rs"), include_str!("../../man/socket-proxyd.8"));
        let is_id = |word: &str| word.len() == 32 && word.bytes().all(|it| it.is_ascii_hexdigit());
        let ids = |text: &'static str| -> Vec<_> {
            text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| is_id(word)).collect()
        };
        let known = ids(source);
        assert_eq!(known.len(), 14);
        let unique: BTreeSet<_> = known.into_iter().collect();
        assert_eq!(unique.len(), 14);
        assert_eq!(unique, ids(manual).into_iter().collect());
    }
}
