package main

import (
	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/internal/telemetry"
)

func (a *app) newServe() *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon in the foreground",
		Long: `Run the daemon in the foreground, with its log on standard error.

SIGINT or SIGTERM ends it; machines run on, and the next daemon takes them back.
"agentiso up" runs it in the background; deploy/agentiso.service is a unit for
systemd.`,
		Example: `  agentiso serve
  agentiso serve --config ./agentiso.toml`,
		Args: nargs(0, 0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if a.socket != "" {
				cfg.Server.Socket = a.socket
			}
			log := telemetry.NewLogger(a.stderr, cfg.Server.LogLevel, cfg.Server.LogFormat)
			return serve(cmd.Context(), cfg, log, func() {})
		},
	}
}
