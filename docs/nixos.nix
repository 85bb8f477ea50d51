# A NixOS module for socket-proxyd: a socket unit and a service for each of
# services.socket-proxyd.proxies. docs/recipes.md shows how to use it.
{ config, lib, ... }:

let
  cfg = config.services.socket-proxyd;

  proxy = { name, ... }: {
    options = {
      listenStreams = lib.mkOption {
        type = lib.types.nonEmptyListOf lib.types.str;
        example = [ "127.0.0.1:8080" ];
        description = "Addresses to listen on, as ListenStream= in systemd.socket(5).";
      };
      target = lib.mkOption {
        type = lib.types.str;
        example = "127.0.0.1:3000";
        description = "Address to connect to, as TARGET in socket-proxyd(8).";
      };
      command = lib.mkOption {
        type = lib.types.nullOr lib.types.str;
        default = null;
        description = "Application to start for the first client, as in ExecStart=.";
      };
      service = lib.mkOption {
        type = lib.types.nullOr lib.types.str;
        default = null;
        example = "app.service";
        description = "Service to start together with the proxy.";
      };
      extraArgs = lib.mkOption {
        type = lib.types.listOf lib.types.str;
        default = [ ];
        example = [ "--backend-wait=90s" ];
        description = "Further options, see socket-proxyd(8).";
      };
      groups = lib.mkOption {
        type = lib.types.listOf lib.types.str;
        default = [ ];
        description = "Groups that may use the Unix socket of the target.";
      };
    };
  };

  socket = name: it: {
    description = "Sockets of ${name}";
    wantedBy = [ "sockets.target" ];
    inherit (it) listenStreams;
  };

  service = name: it: {
    description = "Proxy of ${name}";
    requires = [ "${name}.socket" ];
    after = [ "${name}.socket" ] ++ lib.optional (it.service != null) it.service;
    wants = lib.optional (it.service != null) it.service;
    startLimitIntervalSec = 0;
    serviceConfig = {
      Type = "notify";
      ExecStart = lib.concatStringsSep " " (
        [ "${cfg.package}/bin/socket-proxyd" ] ++ it.extraArgs ++ [ it.target ]
        ++ lib.optionals (it.command != null) [ "--" it.command ]
      );
      DynamicUser = true;
      SupplementaryGroups = it.groups;
      CapabilityBoundingSet = "";
      NoNewPrivileges = true;
      ProtectSystem = "strict";
      ProtectHome = true;
      PrivateDevices = true;
      PrivateTmp = true;
      RestrictAddressFamilies = [ "AF_UNIX" "AF_INET" "AF_INET6" ];
      RestrictNamespaces = true;
      SystemCallArchitectures = "native";
      SystemCallFilter = [ "@system-service" ];
      SystemCallErrorNumber = "EPERM";
    } // lib.optionalAttrs (it.command != null) { KillMode = "mixed"; };
  };
in
{
  options.services.socket-proxyd = {
    package = lib.mkOption {
      type = lib.types.package;
      description = "The package that has bin/socket-proxyd.";
    };
    proxies = lib.mkOption {
      type = lib.types.attrsOf (lib.types.submodule proxy);
      default = { };
      description = "Proxies, each a socket unit and a service of that name.";
    };
  };

  config.systemd = {
    sockets = lib.mapAttrs socket cfg.proxies;
    services = lib.mapAttrs service cfg.proxies;
  };
}
