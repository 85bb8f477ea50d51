//! The NixOS module, evaluated with a stub of nixpkgs' library.

use std::process::Command;

use crate::support::*;

/// What the module uses of `lib`, and a configuration with one proxy.
const STUB: &str = r#"
let
  lib = {
    inherit (builtins) mapAttrs concatStringsSep;
    mkOption = option: option;
    optional = condition: value: if condition then [ value ] else [ ];
    optionals = condition: values: if condition then values else [ ];
    optionalAttrs = condition: values: if condition then values else { };
    types = {
      str = "str"; package = "package";
      nonEmptyListOf = type: type; listOf = type: type; nullOr = type: type;
      attrsOf = type: type; submodule = module: (module { name = "app"; }).options;
    };
  };
  module = import MODULE {
    inherit lib;
    config.services.socket-proxyd = {
      package = "/package";
      proxies.app = {
        listenStreams = [ "127.0.0.1:8080" ]; target = "127.0.0.1:3000"; command = "/bin/app 3000";
        service = null; extraArgs = [ "--stop-idle-time=10min" ]; groups = [ ];
      };
    };
  };
in module
"#;

#[test]
fn module_makes_a_socket_and_a_service() {
    let evaluate = ["--eval", "--strict", "--json", "--store", "dummy://", "--expr"];
    let module = STUB.replace("MODULE", &format!("{ROOT}/docs/nixos.nix"));
    let output = Command::new("nix-instantiate").args(evaluate).arg(module).output();
    let Ok(output) = output else {
        return skip("the NixOS module", "nix-instantiate (Debian: nix-bin)");
    };
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let command =
        "/package/bin/socket-proxyd --stop-idle-time=10min 127.0.0.1:3000 -- /bin/app 3000";
    assert!(printed.contains(&format!("\"ExecStart\":\"{command}\"")), "{printed}");
    assert!(printed.contains("\"listenStreams\":[\"127.0.0.1:8080\"]"), "{printed}");
    assert!(printed.contains("\"wantedBy\":[\"sockets.target\"]"), "{printed}");
    assert!(printed.contains("\"KillMode\":\"mixed\""), "{printed}");

    let recipes = std::fs::read_to_string(format!("{ROOT}/docs/recipes.md")).unwrap();
    let (_, recipe) = recipes.split_once("```nix\n").unwrap();
    let recipe = recipe.split("```").next().unwrap();
    let parse = ["--parse", "--store", "dummy://", "--expr", recipe];
    let output = Command::new("nix-instantiate").args(parse).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
