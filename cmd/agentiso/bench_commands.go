package main

import (
	"context"
	"errors"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/measure"
)

const benchHelp = `
The result is one line a case and metric with percentiles, and the ratio to the
contrast measured in the same run; with --json one object a line. The benchmark
runs a daemon of its own over private records and disks, makes kernels and
images that are missing (which takes minutes the first time), and leaves nothing
else behind.`

// benchCommands are the benchmarks below `agentiso bench`.
func (a *app) benchCommands() []*cobra.Command {
	return []*cobra.Command{a.newBenchBoot(), a.newBenchLink()}
}

func (a *app) newBenchBoot() *cobra.Command {
	var n, stockN int
	c := &cobra.Command{
		Use:   "boot",
		Short: "Measure cold boots: QEMU's start to the agent's first answer",
		Long: `Measure cold boots, from QEMU's start to the agent's first answer:

  lean-fast     the lean kernel, the agent as init
  debian-fast   the distribution's cloud kernel, the agent as init
  stock         the same distribution's kernel with its own initramfs and
                systemd, the agent one of its services: the contrast
` + benchHelp,
		Example: `  agentiso bench boot
  agentiso bench boot -n 20 --stock-n 5 --json`,
		Args: nargs(0, 0, "no arguments"),
	}
	c.Flags().IntVarP(&n, "count", "n", 10, "boots of each fast case")
	c.Flags().IntVar(&stockN, "stock-n", 3, "boots of the stock case, which takes half a minute each under emulation")
	c.RunE = a.bench(true, []string{"dev", stockBoot}, func(ctx context.Context, e *benchEnv, tick func(string)) ([]measure.Result, error) {
		return benchBoot(ctx, e, max(n, 1), max(stockN, 1), tick)
	})
	return c
}

func (a *app) newBenchLink() *cobra.Command {
	var n, copies int
	c := &cobra.Command{
		Use:   "link",
		Short: "Measure the way into a guest: round trips and bulk, beside the raw port",
		Long: `Measure the way into a guest:

  raw         the virtio port itself: one byte there and back, 256 MiB each way
  agent       one HTTP call to the agent over the link
  exec-true   "agentiso exec" of true, over the daemon's socket
  cp          "agentiso cp" of 256 MiB each way
` + benchHelp,
		Example: `  agentiso bench link
  agentiso bench link -n 50 --copies 5 --json`,
		Args: nargs(0, 0, "no arguments"),
	}
	c.Flags().IntVarP(&n, "count", "n", 20, "round trips of each kind")
	c.Flags().IntVar(&copies, "copies", 5, "copies of 256 MiB each way")
	c.RunE = a.bench(true, []string{"dev"}, func(ctx context.Context, e *benchEnv, tick func(string)) ([]measure.Result, error) {
		return benchLink(ctx, e, max(n, 2), max(copies, 1), tick)
	})
	return c
}

// bench makes a command of a benchmark: it sees to what the benchmark needs,
// runs it over an environment of its own, and prints the results.
func (a *app) bench(lean bool, images []string, run func(context.Context, *benchEnv, func(string)) ([]measure.Result, error)) func(*cobra.Command, []string) error {
	return a.interruptible(func(ctx context.Context, _ []string) (err error) {
		cfg, err := a.config()
		if err != nil {
			return err
		}
		if err := a.withOwnDaemon(ctx, func(c *client.Client) error {
			p := a.progress("preparing")
			defer p.stop()
			return benchNeeds(ctx, c, lean, images, p.report)
		}); err != nil {
			return err
		}
		e, err := startBench(ctx, cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, e.close()) }()
		p := a.progress("measuring")
		results, err := run(ctx, e, func(what string) { p.report(client.Progress{Stage: what}) })
		p.stop()
		if err != nil {
			return err
		}
		return measure.Print(a.stdout, results, a.json)
	})
}

// withOwnDaemon runs fn with a client of the user's daemon, which is started
// for the time being when none runs.
func (a *app) withOwnDaemon(ctx context.Context, fn func(*client.Client) error) (err error) {
	stop, err := a.startDaemon(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop(context.WithoutCancel(ctx))) }()
	c, err := a.client()
	if err != nil {
		return err
	}
	defer c.Close()
	return fn(c)
}
